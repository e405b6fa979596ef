"""The native checkpoint: the writer's inverse is the reader, and every damage gets a name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from svdquant_pack.kernels import FORMATS, LayerSpec
from svdquant_pack.quantize.files import spelling
from svdquant_pack.quantize.files.checkpoint import CheckpointError, Provenance
from svdquant_pack.quantize.files.dialects import native
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.tensor_file import TensorInfo
from svdquant_pack.tests.kernels.layers import random_layer

CASES = {
    "int4": random_layer("int4", 96, 128, 16, dtype=torch.bfloat16),
    "int4 unsigned": random_layer("int4", 96, 128, 16, (0, 128), torch.float16),
    "int4 ranged": random_layer("int4", 96, 192, 32, (64, 192), torch.bfloat16),
    "int4 rank 0": random_layer("int4", 96, 128, 0, dtype=torch.bfloat16),
    "int4 centred": random_layer("int4", 96, 128, 16, dtype=torch.bfloat16, centred=True),
    "int4 8-bit activations": random_layer("int4", 96, 128, 16, dtype=torch.bfloat16, act_bits=8),
    "nvfp4": random_layer("nvfp4", 96, 128, 16, dtype=torch.bfloat16, centred=True),
    "awq": random_layer("awq_w4a16", 96, 128, dtype=torch.bfloat16),
}
MARKERS = {  # the spelling of ComfyUI pull request 13580, written out
    "int4": {"format": "svdquant_w4a4", "group_size": 64, "rank": 16},
    "int4 unsigned": {"format": "svdquant_w4a4", "group_size": 64, "rank": 16, "act_unsigned": True},
    "int4 ranged": {"format": "svdquant_w4a4_ranged", "group_size": 64, "rank": 32, "act_unsigned_range": [64, 192]},
    "int4 8-bit activations": {"format": "svdquant_w4a4", "act_bits": 8},
    "nvfp4": {"format": "svdquant_nvfp4", "group_size": 16, "rank": 16},
    "awq": {"format": "awq_w4a16", "group_size": 64},
}


def save(path, layer, name="blocks.0.proj", **changes):
    """Write a file of one layer; `changes` replace tensors by suffix, None removes one."""
    tensors = native.encode_layer(name, layer) | {
        f"{name}.bias": torch.zeros(layer.spec.n),
        "head.weight": torch.ones(2),
    }
    for suffix, value in changes.items():
        tensors.pop(f"{name}.{suffix}", None)
        if value is not None:
            tensors[f"{name}.{suffix}"] = value
    metadata = native.metadata_of(
        Provenance("generic", {"depth": 2}, ("depth",), {"rank": 16}, "ab"), {name: layer.spec}
    )
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize("case", CASES)
def test_reading_undoes_writing(tmp_path, case):
    layer = CASES[case]
    checkpoint = open_checkpoint(save(tmp_path / "x.safetensors", layer))
    read = checkpoint.layer("blocks.0.proj")
    assert read.spec == layer.spec and read.tensors.keys() == layer.tensors.keys()
    for name, tensor in layer.tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name].float(), tensor.float())
    assert set(checkpoint.rest) == {"blocks.0.proj.bias", "head.weight"}
    assert checkpoint.provenance == Provenance("generic", {"depth": 2}, ("depth",), {"rank": 16}, "ab")
    assert checkpoint.weight_infos()["blocks.0.proj.weight"].shape == (layer.spec.n, layer.spec.k)


@pytest.mark.parametrize("case", MARKERS)
def test_the_marker_is_spelled_as_specified(case):
    marker = native.marker_of(CASES[case].spec)
    assert {key: marker[key] for key in MARKERS[case]} == MARKERS[case]
    assert marker["orig_shape"] == [CASES[case].spec.n, CASES[case].spec.k]


def test_the_parts_are_spelled_as_specified():
    names = {name.removeprefix("X.") for name in native.encode_layer("X", CASES["int4"])}
    assert names == {"weight", "weight_scale", "proj_down", "proj_up", "smooth_factor", "comfy_quant"}
    assert "X.weight_scale_2" in native.encode_layer("X", CASES["nvfp4"])
    assert {"X.act_mean", "X.out_mean"} < native.encode_layer("X", CASES["int4 centred"]).keys()
    assert "X.weight_zero" in native.encode_layer("X", CASES["awq"])


def marker(**changes) -> torch.Tensor:
    text = json.dumps(native.marker_of(CASES["int4"].spec) | changes)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


DAMAGE = {
    "unknown format": ({"comfy_quant": marker(format="int3")}, "format 'int3' is unknown"),
    "lying rank": ({"comfy_quant": marker(rank=32)}, "says rank 32, the tensors say 16"),
    "lying shape": ({"comfy_quant": marker(orig_shape=[96, 256])}, r"orig_shape \[96, 256\]"),
    "marker is no JSON": ({"comfy_quant": torch.zeros(5, dtype=torch.uint8)}, "blocks.0.proj"),
    "no marker": ({"comfy_quant": None}, "holds no 4-bit layers|comfy_quant is missing"),
    "no scales": ({"weight_scale": None}, "wscales is missing"),
    "scales of another group": ({"weight_scale": torch.ones(8, 96)}, r"wscales has shape \(8, 96\).*needs \(2, 96\)"),
    "rank mismatch": ({"proj_up": torch.ones(96, 32)}, r"proj_up has shape \(96, 32\)"),
    "wrong dtype": ({"weight": torch.zeros(96, 64)}, "qweight has dtype float32, needed int8"),
    "half a mean": ({"act_mean": torch.zeros(128)}, "act_mean and out_mean belong together"),
    "activation bits": ({"comfy_quant": marker(act_bits=5)}, "activations in 5 bit: int4 has 4 or 8"),
    "odd part": ({"lora_up": torch.ones(3)}, "lora_up is not part of a 4-bit layer"),
    "bias": ({"bias": torch.zeros(95)}, r"bias has shape \(95,\), needed \(96,\)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_on_opening(tmp_path, kind):
    changes, message = DAMAGE[kind]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(save(tmp_path / "x.safetensors", CASES["int4"], **changes))
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("part", ["weight_scale", "proj_down", "smooth_factor"])
def test_nan_is_named_on_reading_the_layer(tmp_path, part):
    tensor = CASES["int4"][spelling.PARTS[part]].clone()
    tensor.view(-1)[0] = float("nan")
    checkpoint = open_checkpoint(save(tmp_path / "x.safetensors", CASES["int4"], **{part: tensor}))
    with pytest.raises(CheckpointError, match=r"layer 'blocks.0.proj': \w+ holds NaN"):
        checkpoint.layer("blocks.0.proj")


def test_a_shifted_layer_without_bias_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="bias is missing"):
        open_checkpoint(save(tmp_path / "x.safetensors", CASES["int4 unsigned"], bias=None))


def test_an_unknown_family_and_a_newer_version_are_refused(tmp_path):
    layer = CASES["int4"]
    tensors = native.encode_layer("b.0", layer)
    for change, message in (({"family": "nope"}, "family 'nope' is unknown"), ({"version": 99}, "Update the pack")):
        metadata = native.metadata_of(Provenance(), {"b.0": layer.spec})
        metadata["svdquant"] = json.dumps(json.loads(metadata["svdquant"]) | change)
        save_file(tensors, tmp_path / "x.safetensors", metadata)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "x.safetensors")


def test_a_plain_model_is_told_where_to_go(tmp_path):
    save_file({"blocks.0.weight": torch.ones(4, 4)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="Load Diffusion Model node"):
        open_checkpoint(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("format", FORMATS)
def test_markers_and_specs_are_inverse(format):
    layer = random_layer(format, 64, 128)
    infos = {name: TensorInfo.of(tensor) for name, tensor in layer.tensors.items()}
    assert native.spec_of(native.marker_of(layer.spec), infos) == layer.spec
    assert LayerSpec(**layer.spec.__dict__) == layer.spec
