"""GGUF: a header of keys and tensor places, then the data. F32, F16 and BF16 are read exactly as they are.

Blocks of fewer bits (Q4_K and so on) appear as fp32, as the Python package `gguf` decodes them; without it they are
refused. The header is read here, within limits: the package maps the whole file, and a mapped file that is cut short
kills the process. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    b"GGUF", u32 version, u64 tensors, u64 keys
    a key     string name, u32 type, value; a string is u64 size, UTF-8; an array u32 type, u64 count, values
    a tensor  string name, u32 dimensions, u64 sizes (the last of torch first), u32 type, u64 offset into the data
    the data  starts at the next multiple of `general.alignment`, 32 where that is not there

A tensor that ggml could not hold in its own shape has that as `comfy.gguf.orig_shape.NAME`.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..raw_file import RawFile
from ..tensor_file import TensorFile, TensorFileError, TensorInfo
from ..tensors import TensorView
from . import SourceKind

VERSIONS = (2, 3)
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64, 24: torch.int8, 26: torch.int32}
NUMBERS = ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")  # of a key's value, by its type
STRING, ARRAY = 8, 9
SHAPES = "comfy.gguf.orig_shape."
MOST_TENSORS, MOST_KEYS, MOST_VALUES, MOST_DIMENSIONS = 1 << 17, 1 << 16, 1 << 16, 8
LONGEST = 1 << 20  # bytes of a text
LARGEST_HEADER = 100_000_000  # bytes, as of safetensors
CHUNK = 1 << 20


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `start` and `size` in bytes of the file, `kind` as ggml counts types, whole rows."""

    start: int
    size: int
    kind: int
    rows: int


class _Header:
    """What is read one value after the other, at most LARGEST_HEADER bytes of it."""

    def __init__(self, file: RawFile) -> None:
        self.file, self.at = file, 0
        self._piece, self._start = b"", 0

    def refuse(self, problem: str) -> TensorFileError:
        return TensorFileError(
            f"{self.file.path.name}: its GGUF header {problem}. The file is damaged: download it again"
        )

    def take(self, size: int) -> bytes:
        if self.at + size > LARGEST_HEADER:
            raise self.refuse(f"is larger than {LARGEST_HEADER:,} bytes")
        end = self.at + size - self._start
        if self.at < self._start or end > len(self._piece):
            wanted = max(size, min(CHUNK, self.file.size - self.at))
            self._start, self._piece = self.at, bytes(self.file.read(self.at, wanted, "the header").numpy())
            end = size
        found = self._piece[self.at - self._start : end]
        self.at += size
        return found

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        size = self.number("Q")
        if size > LONGEST:
            raise self.refuse(f"has a text of {size:,} bytes, at most {LONGEST:,} are read")
        return self.take(size).decode("utf-8", "backslashreplace")

    def value(self, kind: int) -> Any:
        """The value of a key; of an array of texts, and of a long one, nothing: none of them is needed."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(self.code(kind))
        kind, count = self.number("I"), self.number("Q")
        if count > LARGEST_HEADER:
            raise self.refuse(f"has an array of {count:,} values")
        if kind == STRING:
            for _ in range(count):
                self.text()
            return []
        code = self.code(kind)
        size = count * struct.calcsize(code)
        if count > MOST_VALUES:  # scores of a tokenizer, say
            self.at += size
            return []
        return list(struct.unpack(f"<{count}{code}", self.take(size)))

    def code(self, kind: int) -> str:
        if kind >= len(NUMBERS) or not NUMBERS[kind]:
            raise self.refuse(f"has a value of type {kind}, which is none")
        return NUMBERS[kind]


def open_file(path: Path) -> TensorFile:
    """Raises TensorFileError for a damaged file, and for a type of tensor that cannot be decoded here."""
    file = RawFile(path)
    header = _Header(file)
    header.take(4)
    version = header.number("I")
    if version not in VERSIONS:
        raise TensorFileError(f"{path.name}: is GGUF of version {version}, read are {VERSIONS[0]} and {VERSIONS[1]}")
    tensors, keys = header.number("Q"), header.number("Q")
    if tensors > MOST_TENSORS or keys > MOST_KEYS:
        raise header.refuse(f"counts {tensors:,} tensors and {keys:,} keys")
    found = {header.text(): header.value(header.number("I")) for _ in range(keys)}
    places = [_tensor(header) for _ in range(tensors)]
    step = found.get("general.alignment", 32)
    if not isinstance(step, int) or step <= 0 or step > 1 << 16:
        raise header.refuse(f"says that data is aligned to {step!r:.20}")
    data = -(-header.at // step) * step
    stored: dict[str, Stored] = {}
    infos: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in places:
        if name in stored:
            raise header.refuse(f"names {name} twice")
        size = _size(header, name, shape, kind)
        if data + offset + size > file.size:
            raise TensorFileError(
                f"{path.name}: {name} would end at byte {data + offset + size:,} of {file.size:,}. The file is "
                "truncated or damaged: compare its size with the original and download it again"
            )
        stored[name] = Stored(data + offset, size, kind, math.prod(shape[:-1]))
        infos[name] = TensorInfo(_shape(header, found, name, shape), PLAIN.get(kind, torch.float32))

    def read(name: str) -> torch.Tensor:
        place = stored[name]
        raw = file.read(place.start, place.size, name)
        if place.kind in PLAIN:
            return raw.view(PLAIN[place.kind]).reshape(infos[name].shape)
        return _dequantize(raw.view(place.rows, -1), place.kind).reshape(infos[name].shape)

    return TensorView(path, infos, read)


def _tensor(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape as torch has it, type, offset)"""
    name, count = header.text(), header.number("I")
    if count > MOST_DIMENSIONS:
        raise header.refuse(f"gives {name[:200]!r} {count} dimensions")
    sizes = [header.number("Q") for _ in range(count)]
    return name, tuple(reversed(sizes)), header.number("I"), header.number("Q")


def _size(header: _Header, name: str, shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor; rows are whole blocks."""
    block, size = (1, PLAIN[kind].itemsize) if kind in PLAIN else _block(header.file.path, name, kind)
    if math.prod(shape) > 1 << 48 or (shape[-1] if shape else 1) % block:
        raise header.refuse(f"gives {name[:200]!r} the shape {shape}, needed rows of whole blocks of {block}")
    return math.prod(shape) // block * size


def _shape(header: _Header, keys: dict[str, Any], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    own = keys.get(f"{SHAPES}{name}")
    if own is None:
        return shape
    if not isinstance(own, list) or len(own) > MOST_DIMENSIONS or not all(isinstance(size, int) for size in own):
        raise header.refuse(f"gives {name[:200]!r} another shape, {own!r:.80}, which is none")
    if min(own, default=1) < 0 or math.prod(own) != math.prod(shape):
        raise header.refuse(f"gives {name[:200]!r} the shapes {shape} and {tuple(own)}")
    return tuple(own)


def _package(path: Path, name: str) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise TensorFileError(
            f"{path.name}: {name} is in fewer than 16 bits, which the Python package gguf decodes and which is not "
            "there: pip install gguf, or use an F16 or BF16 file"
        ) from error
    return gguf


def _block(path: Path, name: str, kind: int) -> tuple[int, int]:
    """(numbers, bytes) of one block."""
    gguf = _package(path, name)
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        _dequantize(torch.zeros(1, size, dtype=torch.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise TensorFileError(
            f"{path.name}: {name} is of ggml's type {kind}, which the installed gguf package cannot decode: "
            "pip install -U gguf, or use a file of another type"
        ) from error
    return int(block), int(size)


def _dequantize(rows: torch.Tensor, kind: int) -> torch.Tensor:
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType(kind)))


KIND = SourceKind("gguf", lambda path, head: head.startswith(b"GGUF"), open_file)
