"""Damaged files: always the model that was written, or an error with a type; never a crash or other weights.

A mutation changes what a header says: names, shapes, dtypes, offsets, metadata, length. Numbers are only changed into
NaN and Inf; any other number is as good as the one before it. 2,300 files in all,
or as many as SVDQUANT_FUZZ says (`make fuzz`: 50,000).
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svdquant_pack.kernels.layer import Layer
from svdquant_pack.quantize.files import spelling
from svdquant_pack.quantize.files.checkpoint import Checkpoint, CheckpointError, Provenance
from svdquant_pack.quantize.files.dialects import kitchen, native
from svdquant_pack.quantize.files.dialects.nunchaku.layers import PARTS
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.tensor_file import DTYPES, TensorFileError
from svdquant_pack.tests.kernels.layers import random_layer
from svdquant_pack.tests.quantize.stored_models import quantization_config, save_model, stored_model
from svdquant_pack.tests.quantize.test_layout import same_bytes

LAYERS = {
    "blocks.0.proj": random_layer("int4", 128, 128, 16, dtype=torch.bfloat16),
    "blocks.0.gelu": random_layer("int4", 128, 128, 32, (0, 128), torch.bfloat16),
    "blocks.0.mod": random_layer("awq_w4a16", 128, 128, dtype=torch.bfloat16),
}


def native_model() -> dict[str, torch.Tensor]:
    return _model(LAYERS | {"blocks.1.proj": random_layer("nvfp4", 128, 128, 16)}, native.encode_layer)


def kitchen_model() -> dict[str, torch.Tensor]:
    return _model(LAYERS, lambda name, layer: kitchen.encode_layer(name, layer, tile_packed=name.endswith("proj")))


def _model(
    layers: dict[str, Layer], encode: Callable[[str, Layer], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    tensors = {key: tensor for name, layer in layers.items() for key, tensor in encode(name, layer).items()}
    return tensors | {f"{name}.bias": torch.zeros(layer.spec.n) for name, layer in layers.items()}


MODELS = {  # name -> (tensors, metadata, examples)
    "flux int4": (lambda: stored_model("flux"), quantization_config(), 500),
    "flux nvfp4": (lambda: stored_model("flux", "nvfp4"), quantization_config("nvfp4"), 450),
    "flux lite": (lambda: stored_model("flux", lite=True), {}, 250),
    "qwen_image int4": (lambda: stored_model("qwen_image"), quantization_config(), 300),
    "z_image nvfp4": (lambda: stored_model("z_image", "nvfp4"), quantization_config("nvfp4"), 250),
    "native": (native_model, native.metadata_of(Provenance(), {}), 300),
    "kitchen": (kitchen_model, {}, 250),
}
USUAL_COUNT = 2300
COUNT = int(os.environ.get("SVDQUANT_FUZZ", USUAL_COUNT))  # files in all
LAYER_SUFFIXES = {*PARTS, *spelling.PARTS, *kitchen.PARTS} - {"bias"}


class File:
    """A safetensors file in parts: header as an object, data as bytes."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        self.header: dict[str, Any] = json.loads(raw[8 : 8 + size])
        self.metadata: dict[str, str] = self.header.pop("__metadata__", {})
        self.data = bytearray(raw[8 + size :])
        self.tail = b""
        self.cut: int | None = None
        self.length: int | None = None

    def write(self, path: Path) -> None:
        header = json.dumps({"__metadata__": self.metadata, **self.header}).encode()
        length = len(header) if self.length is None else self.length
        raw = struct.pack("<Q", length) + header + bytes(self.data) + self.tail
        path.write_bytes(raw if self.cut is None else raw[: self.cut % len(raw)])


def part_names(file: File, every: bool) -> list[str]:
    """What may be mutated: everything where the model's own shapes are known, else what belongs to 4-bit layers."""
    names = [name for name in file.header if every or name.rpartition(".")[2] in LAYER_SUFFIXES]
    return sorted(names)


def is_layer(name: str) -> bool:
    return name.rpartition(".")[2] in LAYER_SUFFIXES - {"weight"}


def mutate(file: File, data: st.DataObject, every: bool) -> None:
    names = part_names(file, every)
    name = data.draw(st.sampled_from(names))
    kind = data.draw(
        st.sampled_from(["drop", "rename", "copy", "dtype", "shape", "offsets", "metadata", "nan", "length", "tail"])
    )
    if name not in file.header:
        return
    entry = file.header[name]
    if kind == "drop":
        del file.header[name]
    elif kind in ("rename", "copy"):
        _rename(file, data, name, names, keep=kind == "copy")
    elif kind == "dtype":
        floats = () if is_layer(name) or not every else ("F16", "BF16")
        entry["dtype"] = data.draw(st.sampled_from([*(key for key in DTYPES if key not in floats), "F4", "U16", 7]))
    elif kind == "shape":
        entry["shape"] = data.draw(st.one_of(st.permutations(entry["shape"]), _shapes(entry["shape"])))
    elif kind == "offsets":
        edge = data.draw(st.integers(0, 1))
        entry["data_offsets"][edge] += data.draw(st.sampled_from([-256, -1, 1, 2, 256, 1 << 40]))
    elif kind == "metadata":
        _change_metadata(file, data)
    elif kind == "nan" and entry.get("dtype") in ("BF16", "F16") and is_layer(name):
        place = entry["data_offsets"][0] & ~1
        file.data[place : place + 2] = struct.pack("<H", 0x7FFF if data.draw(st.booleans()) else 0xFFC0)
    elif kind == "length":
        file.cut = data.draw(st.one_of(st.none(), st.integers(0, 1 << 24)))
        file.length = data.draw(st.sampled_from([None, 0, 1, 8, 1 << 20, 1 << 62, (1 << 64) - 1]))
    elif kind == "tail":
        file.tail = data.draw(st.binary(min_size=1, max_size=8))


def _rename(file: File, data: st.DataObject, name: str, names: list[str], keep: bool) -> None:
    module, _, suffix = name.rpartition(".")
    other = data.draw(st.sampled_from(names)).rpartition(".")
    new = data.draw(
        st.sampled_from(
            [
                f"{other[0]}.{suffix}",
                f"{module}.{data.draw(st.sampled_from(sorted(LAYER_SUFFIXES)))}",
                name.replace("blocks.0", "blocks.1").replace("layers.0", "layers.2"),
                f"{module}.{data.draw(st.text(max_size=6))}",
                f"model.diffusion_model.{name}",
            ]
        )
    )
    if new not in file.header:
        file.header[new] = dict(file.header[name])
        if not keep:
            del file.header[name]


def _shapes(shape: list[int]) -> st.SearchStrategy[list[int]]:
    sizes = st.sampled_from([0, 1, 2, 16, 64, 127, 128, 256, 1 << 33, *shape])
    return st.one_of(
        st.lists(sizes, max_size=4),
        st.just([*shape, 1]),
        st.just([1, *shape]),
        st.just([shape[0] * 2, *[size // 2 for size in shape[1:]]] if shape else [1]),
    )


def _change_metadata(file: File, data: st.DataObject) -> None:
    keys = ["quantization_config", "config", "comfy_config", "svdquant", "unet_config", "_quantization_metadata"]
    lies = [
        {"weight": {"dtype": "fp4_e2m1_all"}, "rank": 16},
        {"weight": {"dtype": "int4"}, "rank": 128},
        {"weight": {"dtype": 4}, "rank": "16"},
        {"svdq_w4a4": {"precision": "int4", "rank": 48}},
        {"quant_method": "nunchaku_lite"},
        {"shapes": {"transformer_blocks.0.qkv_proj": [300, 100]}},
        {"shapes": 3, "version": "x", "pinned": [[]], "family": 7},
        {"layers": {"blocks.0.proj": {"format": "svdquant_w4a4", "rank": 64}}},
        {"formats": {"blocks.0.proj": "nvfp4"}, "family": "no such family"},
        [],
        None,
        1e308,
    ]
    text = data.draw(st.one_of(st.sampled_from(lies).map(json.dumps), st.text(max_size=12)))
    file.metadata[data.draw(st.sampled_from(keys))] = text


def read_all(checkpoint: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in checkpoint.specs:
        layer = checkpoint.layer(name)
        found[name] = layer.spec
        found |= {f"{name}|{part}": tensor for part, tensor in layer.tensors.items()}
    return found | {name: checkpoint.tensor(name) for name in checkpoint.rest}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        same = same_bytes(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        assert same, f"{key} is not what was written"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """model name -> (path, everything that is read from it)"""
    folder, found = tmp_path_factory.mktemp("fuzz"), {}
    for name, (make, metadata, _) in MODELS.items():
        path = save_model(folder / f"{name}.safetensors", make(), metadata)
        found[name] = path, read_all(open_checkpoint(path))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_mutated_file_is_the_original_or_a_typed_error(originals, name):
    path, wanted = originals[name]
    target, every = path.with_name("mutated.safetensors"), name not in ("native", "kitchen")
    raw = path.read_bytes()
    opened = []

    @settings(
        max_examples=max(1, MODELS[name][2] * COUNT // USUAL_COUNT),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=COUNT == USUAL_COUNT,  # more files are other files each time
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        file = File(path)
        for _ in range(data.draw(st.integers(1, 2))):
            mutate(file, data, every)
        file.write(target)
        try:
            found = read_all(open_checkpoint(target))
        except (CheckpointError, TensorFileError) as error:
            assert target.name in str(error)
            opened.append(False)
            return
        opened.append(True)
        assert_same(found, wanted)

    check()
    assert path.read_bytes() == raw
    assert opened.count(False) > len(opened) / 3  # the mutations do reach the checks
