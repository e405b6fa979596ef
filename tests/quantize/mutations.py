"""Damage for files, by name: what a fuzz test does to a safetensors file, to a JSON text and to a value.

file = File(path)
done = damage(file, Random("seed"), names, KINDS)  # ["dtype of a.weight", ...]
file.write(other)
file.tensors()  # what the damaged file holds, by a reader that shares no code with the pack
"""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from svdquant_pack.quantize.files.tensor_file import DTYPES

DEEP = 100_000
MARK = "@ here @"  # stands in a JSON text for what json.dumps cannot write


class File:
    """A safetensors file in parts: header as an object, data as bytes, and what is done when it is written again."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        self.header: dict[str, Any] = json.loads(raw[8 : 8 + size])
        self.metadata: dict[str, Any] = self.header.pop("__metadata__", {})
        self.data = bytearray(raw[8 + size :])
        self.raw = ""  # more members of the header, as text
        self.tail = b""
        self.cut: float | None = None
        self.length: int | None = None

    def write(self, path: Path) -> None:
        text = json.dumps({"__metadata__": self.metadata, **self.header})
        header = (text[:-1] + self.raw + "}").encode()
        length = len(header) if self.length is None else self.length
        raw = struct.pack("<Q", length) + header + bytes(self.data) + self.tail
        path.write_bytes(raw if self.cut is None else raw[: int(self.cut * len(raw))])

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the file holds; only for one that a reader accepts."""
        found = {}
        for name, entry in self.header.items():
            start, stop = entry["data_offsets"]
            data = torch.frombuffer(bytearray(self.data[start:stop]), dtype=torch.uint8) if stop > start else None
            data = torch.empty(0, dtype=torch.uint8) if data is None else data
            found[name] = data.view(DTYPES[entry["dtype"]]).view(entry["shape"])
        return found

    def place(self, name: str, rng: Random, step: int = 1) -> int | None:
        """Where one number of a tensor lies; None for a tensor without numbers."""
        start, stop = _bytes_of(self, name)
        return start + rng.randrange((stop - start) // step) * step if stop - start >= step else None


Names = Sequence[str]


def _bytes_of(file: File, name: str) -> tuple[int, int]:
    """Where a tensor's bytes lie, whatever an earlier damage made of its offsets."""
    start, stop = (min(max(0, edge), len(file.data)) for edge in file.header[name]["data_offsets"])
    return start, max(start, stop)


def flip(file: File, name: str, names: Names, rng: Random) -> None:
    for _ in range(rng.choice([1, 1, 8])):
        place = file.place(name, rng)
        if place is not None:
            file.data[place] ^= rng.randrange(1, 256)


def zeros(file: File, name: str, names: Names, rng: Random) -> None:
    start, stop = _bytes_of(file, name)
    file.data[start:stop] = bytes(stop - start)


def swap(file: File, name: str, names: Names, rng: Random) -> None:
    entry = file.header[name]
    alike = [n for n in names if n != name and file.header.get(n, {}).get("shape") == entry["shape"]]
    alike = [n for n in alike if file.header[n]["dtype"] == entry["dtype"]]
    if alike:
        other = rng.choice(alike)
        file.header[name], file.header[other] = file.header[other], entry


def not_finite(file: File, name: str, names: Names, rng: Random) -> None:
    bad = {"BF16": b"\xc0\xff", "F16": b"\x00\x7e", "F32": b"\x00\x00\x80\x7f", "F8_E4M3": b"\x7f", "F64": b"\xff" * 8}
    value = bad.get(file.header[name]["dtype"])
    place = None if value is None else file.place(name, rng, len(value))
    if value is not None and place is not None:
        file.data[place : place + len(value)] = value


def huge(file: File, name: str, names: Names, rng: Random) -> None:
    value = {"BF16": b"\x7f\x7f", "F16": b"\xff\x7b", "F32": b"\xff\xff\x7f\xff"}.get(file.header[name]["dtype"])
    place = None if value is None else file.place(name, rng, len(value))
    if value is not None and place is not None:
        file.data[place : place + len(value)] = value


def drop(file: File, name: str, names: Names, rng: Random) -> None:
    del file.header[name]


def drop_layer(file: File, name: str, names: Names, rng: Random) -> None:
    """All tensors of one layer, but perhaps one."""
    layer, spared = name.rpartition(".")[0], rng.choice(names)
    for each in [each for each in file.header if each.rpartition(".")[0] == layer and each in names]:
        if each != spared:
            del file.header[each]


def _other_name(file: File, name: str, names: Names, rng: Random) -> str:
    module, _, suffix = name.rpartition(".")
    other = rng.choice(names).rpartition(".")
    return rng.choice(
        [
            f"{other[0]}.{suffix}",
            f"{module}.{other[2]}",
            name.replace("blocks.0", "blocks.1").replace("layers.0", "layers.2"),
            f"{module}.{odd_text(rng)}",
            f"model.diffusion_model.{name}",
            odd_text(rng),
        ]
    )


def rename(file: File, name: str, names: Names, rng: Random) -> None:
    new = _other_name(file, name, names, rng)
    if new not in file.header:
        file.header[new] = file.header.pop(name)


def copy(file: File, name: str, names: Names, rng: Random) -> None:
    file.header.setdefault(_other_name(file, name, names, rng), dict(file.header[name]))


def append(file: File, name: str, names: Names, rng: Random) -> None:
    """A copy with bytes of its own, as a legal file has it."""
    start, stop = _bytes_of(file, name)
    new = _other_name(file, name, names, rng)
    if new not in file.header:
        file.header[new] = {**file.header[name], "data_offsets": [len(file.data), len(file.data) + stop - start]}
        file.data += file.data[start:stop]


def remove(file: File, name: str, names: Names, rng: Random) -> None:
    """A tensor with its bytes: what is left is a legal file."""
    start, stop = _bytes_of(file, name)
    del file.header[name]
    del file.data[start:stop]
    for entry in file.header.values():
        entry["data_offsets"] = [edge - (stop - start) * (edge >= stop) for edge in entry["data_offsets"]]


def dtype(file: File, name: str, names: Names, rng: Random) -> None:
    """Another one, mostly one that takes as many bytes."""
    entry = file.header[name]
    sizes = {key: value.itemsize for key, value in DTYPES.items()}
    alike = [key for key in DTYPES if sizes[key] == sizes.get(entry["dtype"]) and key != entry["dtype"]]
    entry["dtype"] = rng.choice([*alike, *alike, *DTYPES, "F4", "U16", "F8_E8M0", "", 7])


def shape(file: File, name: str, names: Names, rng: Random) -> None:
    old = file.header[name]["shape"]
    sizes = [0, 1, 2, 16, 64, 127, 128, 256, 1 << 33, -1, *old]
    file.header[name]["shape"] = rng.choice(
        [
            old[::-1],
            rng.sample(old, len(old)),
            [rng.choice(sizes) for _ in range(rng.randrange(5))],
            [*old, 1],
            [1, *old],
            [old[0] * 2, *[size // 2 for size in old[1:]]] if old else [1],
            [1] * 500,
        ]
    )


def offsets(file: File, name: str, names: Names, rng: Random) -> None:
    edges = file.header[name]["data_offsets"]
    kind = rng.randrange(3)
    if kind:
        edges[rng.randrange(2)] += rng.choice([-256, -1, 1, 2, 256, 1 << 40])
    else:
        file.header[name]["data_offsets"] = list(file.header[rng.choice(list(file.header))]["data_offsets"])


def resize(file: File, name: str, names: Names, rng: Random) -> None:
    """A legal file in which one tensor has other rows: more, fewer or none."""
    entry = file.header[name]
    start, stop = _bytes_of(file, name)
    if not entry["shape"] or not entry["shape"][0] or stop == start:
        return
    rows, size = entry["shape"][0], (stop - start) // entry["shape"][0]
    new = rng.choice([0, 1, max(0, rows - 1), rows + 1, rows * 2, rows // 2])
    data = (bytes(file.data[start:stop]) * 2)[: new * size]
    remove(file, name, names, rng)
    place = [len(file.data), len(file.data) + len(data)]
    file.header[name] = {**entry, "shape": [new, *entry["shape"][1:]], "data_offsets": place}
    file.data += data


def length(file: File, name: str, names: Names, rng: Random) -> None:
    file.length = rng.choice([0, 1, 8, 1 << 20, 1 << 62, (1 << 64) - 1])


def cut(file: File, name: str, names: Names, rng: Random) -> None:
    file.cut = rng.choice([0.0, rng.random(), rng.random() / 100, 0.999999])


def tail(file: File, name: str, names: Names, rng: Random) -> None:
    file.tail = rng.randbytes(rng.randrange(1, 9))


def metadata(file: File, name: str, names: Names, rng: Random) -> None:
    keys = [
        "quantization_config",
        "config",
        "comfy_config",
        "svdquant",
        "unet_config",
        "recipe",
        "statistics",
        "record",
    ]
    key = rng.choice([*keys, "_quantization_metadata", "checksum", *file.metadata])
    file.metadata[key] = rng.choice([*map(json.dumps, LIES), odd_text(rng), hostile(file.metadata.get(key), rng)])


def no_metadata(file: File, name: str, names: Names, rng: Random) -> None:
    if file.metadata:
        del file.metadata[rng.choice(list(file.metadata))]


def header(file: File, name: str, names: Names, rng: Random) -> None:
    """What json.dumps does not write: the same key twice, endless numbers, NaN, names that are no text."""
    entry = json.dumps(file.header[rng.choice([each for each in names if each in file.header])])
    key = json.dumps(name)
    file.raw = ", " + rng.choice(
        [
            f"{key}: {entry}",
            f'{key}: {{"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
            f'{key}: {{"dtype": "F32", "shape": [{"9" * 4400}], "data_offsets": [0, 4]}}',
            f'{key}: {{"dtype": "F32", "shape": [NaN], "data_offsets": [0, Infinity]}}',
            f'"x": {"[" * DEEP}{"]" * DEEP}',
            f'"x": {"[" * DEEP}',
            '"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}',
            '"__metadata__": {"svdquant": "{}"}',
            '"__metadata__": []',
            '"x": null',
        ]
    )


def marker(file: File, name: str, names: Names, rng: Random) -> None:
    """Another text in the marker of a 4-bit layer, as a legal file has it."""
    markers = [each for each in file.header if each.endswith(".comfy_quant")]
    if not markers:
        return
    name = rng.choice(markers)
    start, stop = _bytes_of(file, name)
    text = bytes(file.data[start:stop]).decode(errors="replace")
    new = hostile(text, rng).encode(errors="surrogatepass")[: 1 << 18]
    remove(file, name, names, rng)
    place = [len(file.data), len(file.data) + len(new)]
    file.header[name] = {"dtype": "U8", "shape": [len(new)], "data_offsets": place}
    file.data += new


Damage = Callable[[File, str, Names, Random], None]
# the header stays right: without checksums nobody can see it
PAYLOAD: dict[str, Damage] = {"flip": flip, "zeros": zeros, "swap": swap, "not finite": not_finite, "huge": huge}
STRUCTURE: dict[str, Damage] = {
    "drop": drop,
    "drop layer": drop_layer,
    "rename": rename,
    "copy": copy,
    "append": append,
    "remove": remove,
    "dtype": dtype,
    "shape": shape,
    "offsets": offsets,
    "resize": resize,
    "length": length,
    "cut": cut,
    "tail": tail,
    "metadata": metadata,
    "no metadata": no_metadata,
    "header": header,
    "marker": marker,
}
KINDS = PAYLOAD | STRUCTURE

LIES: list[Any] = [
    {"weight": {"dtype": "fp4_e2m1_all"}, "rank": 16},
    {"weight": {"dtype": "int4"}, "rank": 128},
    {"weight": {"dtype": 4}, "rank": "16"},
    {"svdq_w4a4": {"precision": "int4", "rank": 48}},
    {"quant_method": "nunchaku_lite"},
    {"shapes": {"transformer_blocks.0.qkv_proj": [300, 100]}},
    {"shapes": 3, "version": "x", "pinned": [[]], "family": 7},
    {"layers": {"blocks.0.proj": {"format": "svdquant_w4a4", "rank": 64}}},
    {"formats": {"blocks.0.proj": "nvfp4"}, "family": "no such family"},
    {"image_model": "flux", "depth": 20000, "num_heads": 0, "axes_dim": [1], "operations": "torch.nn"},
    [],
    None,
    1e308,
]


def damage(file: File, rng: Random, names: Names, kinds: Sequence[str]) -> list[str]:
    """Do one or two kinds of damage; returns what was done."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        there = [name for name in names if name in file.header]
        if there:
            kind, name = rng.choice(kinds), rng.choice(there)
            KINDS[kind](file, name, there, rng)
            done.append(f"{kind} of {name}")
    return done


def odd_text(rng: Random) -> str:
    return rng.choice(["", "\0", "..", "../../x", "a" * 300, "\ud800", "weight.", ".weight", "é\u202e", "%s{0}", "\n"])


def odd_value(rng: Random) -> Any:
    """What no field of anything is meant to hold."""
    numbers = [0, -1, 1, 3, 16, 1 << 31, 1 << 63, 10**4400, -(10**30), 0.5, 1e308, float("nan"), float("inf"), True]
    others = [None, [], {}, [[]], {"a": {}}, "16", "nan", b"x", odd_text(rng), "x" * 5000, [None] * 1000]
    return rng.choice([rng.choice(numbers), rng.choice(others)])


def hostile(text: str | None, rng: Random) -> str:
    """A JSON text that is not what `text` was: by shape, size, value or spelling."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, TypeError):
        value = {}
    kind = rng.randrange(12)
    if kind < 4 and isinstance(value, dict) and value:  # one of its own values is another
        key = rng.choice(list(value))
        return json.dumps({**value, key: MARK}).replace(json.dumps(MARK), hostile_value(rng))
    if kind == 4 and isinstance(value, dict) and value:  # the same key twice
        key = rng.choice(list(value))
        return f"{json.dumps(value)[:-1]}, {json.dumps(key)}: {hostile_value(rng)}}}"
    if kind == 5 and text:
        return text[: rng.randrange(len(text))]
    if kind == 6 and text:
        place = rng.randrange(len(text))
        return text[:place] + chr(rng.randrange(256)) + text[place + 1 :]
    return hostile_value(rng)


def hostile_value(rng: Random) -> str:
    return rng.choice(
        [
            "[" * DEEP,
            "[" * DEEP + "]" * DEEP,
            '{"a":' * DEEP + "1" + "}" * DEEP,
            "[" * 70 + "]" * 70,
            "1" * 4400,
            "-" + "9" * 20,
            "1e999",
            "-1e-999",
            "NaN",
            "-Infinity",
            '"\\ud800"',
            '["\\ud800\\u0000"]',
            "",
            " ",
            "nul",
            "\ufeff{}",
            "[]",
            "{}",
            "null",
            "true",
            "0",
            "-1",
            "1.5",
            '"x"',
            '[[], {"a": []}]',
            "[" + "0," * 200_000 + "0]",
            '"' + "x" * ((1 << 20) + 1) + '"',
            '{"a": 1, "a": 2}',
            json.dumps(rng.choice(LIES)),
        ]
    )
