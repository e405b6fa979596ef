"""What `convert --to core` writes is what ComfyUI pull request 13580 reads: its names, comfy-kitchen's classes.

`core_linear` is that reader, emulated: the host names the tensors of a layer, comfy-kitchen computes with them. Where
its class is at hand but no GPU, its own plain-torch operations run.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from svdquant_pack.kernels import Layer, LayerSpec, svdquant_linear
from svdquant_pack.quantize.files.checkpoint import CheckpointError
from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.dialects import native
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.lora.bake import bake_layer
from svdquant_pack.quantize.lora.deltas import Columns
from svdquant_pack.quantize.lora.fit import LoraLimits
from svdquant_pack.quantize.lora.loras import LayerLoras
from svdquant_pack.tests.kernels.layers import random_layer
from svdquant_pack.tests.quantize.stored_models import save_model

NAME, N, K = "blocks.0.proj", 192, 256
BF16 = torch.bfloat16


def core_linear(tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """The layer of the pull request on comfy-kitchen; KeyError for a format or a tensor that it does not name."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor", reason="no comfy-kitchen")
    marker = json.loads(bytes(tensors[f"{name}.comfy_quant"].numpy()))
    part = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    shape = part["weight"].shape[0], 2 * part["weight"].shape[1]
    shared = {"scale": part["weight_scale"], "orig_dtype": x.dtype, "orig_shape": shape}
    if marker["format"] == "svdquant_w4a4":
        unsigned = marker.get("act_unsigned", name.endswith(("img_mlp.net.2", "txt_mlp.net.2")))
        branch = {each: part[each] for each in ("proj_down", "proj_up", "smooth_factor")}
        layout, more = "TensorCoreSVDQuantW4A4Layout", {**branch, "act_unsigned": unsigned}
    else:
        layout = {"awq_w4a16": "TensorCoreAWQW4A16Layout"}[marker["format"]]
        more = {"zeros": part["weight_zero"], "group_size": marker.get("group_size", 64)}
    params = getattr(kitchen, layout).Params(**shared, **more)
    bias = part.get("bias")
    return torch.nn.functional.linear(
        x, kitchen.QuantizedTensor(part["weight"], layout, params), None if bias is None else bias.to(x.dtype)
    )


def written(tmp_path, layer: Layer, bias: torch.Tensor | None = None, name: str = NAME):
    """(tensors of the file for core, the layer as it was, notes)"""
    tensors = native.encode_layer(name, layer) | ({} if bias is None else {f"{name}.bias": bias})
    source = save_model(tmp_path / "a.safetensors", tensors)
    report = convert_file(source, tmp_path / "b.safetensors", "core", as_is=True)
    return load_file(tmp_path / "b.safetensors"), report.notes


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def error_of(y: torch.Tensor, x: torch.Tensor, layer: Layer, bias: torch.Tensor | None) -> float:
    """||y - exact|| / ||ours - exact||: comfy-kitchen divides in bf16, so that codes at a border are its neighbours"""
    exact = svdquant_linear(x.float(), layer, None if bias is None else bias.float(), compute="w16")
    ours = svdquant_linear(x, layer, bias, compute="w4a4" if layer.spec.fmt.low_rank else "w16")
    return distance(y, exact) / distance(ours, exact)


def layer_of(format: str, **more) -> tuple[Layer, torch.Tensor]:
    return random_layer(format, N, K, 0 if format == "awq_w4a16" else 16, dtype=BF16, **more), torch.randn(N).to(BF16)


@pytest.mark.parametrize(
    "case",
    [
        {"format": "int4"},
        {"format": "int4", "act_unsigned": (0, K)},
    ],
    ids=str,
)
def test_the_hosts_layer_computes_what_ours_does(tmp_path, case):
    layer, bias = layer_of(**case)
    tensors, notes = written(tmp_path, layer, bias)
    x = torch.nn.functional.gelu(torch.randn(32, K)).to(BF16)
    assert notes == () and error_of(core_linear(tensors, NAME, x), x, layer, bias) < 1.05


def test_the_hosts_modulation_layer_computes_what_ours_does(tmp_path):
    layer, bias = layer_of("awq_w4a16")
    tensors, notes = written(tmp_path, layer, bias)
    x = torch.randn(2, K).to(BF16)
    assert distance(core_linear(tensors, NAME, x), svdquant_linear(x.float(), layer, bias.float())) < 0.01
    assert all("zeros" in note for note in notes)  # they have 32 bit here


@pytest.mark.parametrize(
    ("case", "said", "bound"),
    [
        ({"format": "int4", "centred": True}, "its act_mean is not known there", 0.2),
        ({"format": "int4", "act_bits": 8}, "8-bit activations are not known there", 0.2),
        ({"format": "int4", "act_unsigned": (64, 192)}, "became signed, the shift left the bias", 0.2),
        ({"format": "nvfp4"}, "ComfyUI has no nvfp4; it became int4, which moved its weight by", 0.2),
    ],
    ids=str,
)
def test_what_the_host_does_not_know_becomes_what_it_knows_and_is_said(tmp_path, case, said, bound):
    layer, bias = layer_of(**case)
    tensors, notes = written(tmp_path, layer, bias)
    x = torch.nn.functional.gelu(torch.randn(32, K)).to(BF16)
    exact = svdquant_linear(x.float(), layer, bias.float(), compute="w16")
    assert len(notes) == 1 and said in notes[0] and notes[0].startswith(f"{NAME}: ")
    assert distance(core_linear(tensors, NAME, x), exact) < bound


def test_the_loss_of_another_format_is_the_one_that_is_said(tmp_path):
    layer, _ = layer_of("nvfp4")
    tensors, notes = written(tmp_path, layer)
    spec = LayerSpec("int4", N, K, 16)
    parts = {"weight": "qweight", "weight_scale": "wscales"}
    kept = ("smooth_factor", "proj_down", "proj_up")
    new = Layer(
        spec,
        {own: tensors[f"{NAME}.{theirs}"] for theirs, own in parts.items()}
        | {part: tensors[f"{NAME}.{part}"] for part in kept},
    )
    moved = distance(new.dense_weight(), layer.dense_weight())
    assert 0.01 < moved < 0.2 and f"by {moved:.1%}" in notes[0]


def test_a_layer_without_a_branch_gets_one_of_zeros(tmp_path):
    layer = random_layer("int4", N, K, 0, dtype=BF16)
    tensors, notes = written(tmp_path, layer)
    x = torch.randn(8, K).to(BF16)
    assert notes == () and not tensors[f"{NAME}.proj_up"].any()
    assert error_of(core_linear(tensors, NAME, x), x, layer, None) < 1.05


def test_a_baked_lora_goes_along(tmp_path):
    layer, _ = layer_of("int4")
    down, up = torch.randn(K, 16) / 16, torch.randn(N, 16)
    loras = LayerLoras((Columns(down, up),), (1.0,))
    baked = bake_layer(layer, loras, None, LoraLimits()).layer
    tensors, notes = written(tmp_path, baked)
    x = torch.randn(8, K).to(BF16)
    delta = core_linear(tensors, NAME, x).float() - core_linear(written(tmp_path, layer)[0], NAME, x).float()
    assert notes == () and distance(delta, x.float() @ down @ up.T) < 0.02


def test_what_is_written_opens_here_as_the_same_layers(tmp_path):
    layer, bias = layer_of("int4")
    written(tmp_path, layer, bias)
    again = open_checkpoint(tmp_path / "b.safetensors", as_is=True)
    assert again.dialect == "native" and again.specs[NAME] == layer.spec
    assert all(torch.equal(again.layer(NAME)[part], tensor) for part, tensor in layer.tensors.items())


def test_nvfp4_of_a_width_that_int4_has_not_is_refused_by_name(tmp_path):
    layer = random_layer("nvfp4", N, 96, 16, dtype=BF16)
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.proj' is nvfp4 with K=96.* a multiple of 64"):
        written(tmp_path, layer)
