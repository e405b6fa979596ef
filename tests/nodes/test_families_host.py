"""Every family on ComfyUI's own model: quantized, loaded, equal to the dense model that holds its decoded weights."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.lora

from svdquant_pack.kernels.formats import GELU_SHIFT
from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.nodes.host.patcher import layer_name
from svdquant_pack.nodes.host.source import ModelSource
from svdquant_pack.quantize.families import FAMILIES, detect
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.sampling import relative

EXACT = 1e-4  # float32 sums in another order, through a whole model
LOOSE = 0.15  # the worst, a random model of two blocks, is at 0.10
GOLDEN = Path(__file__).resolve().parents[1] / "quantize" / "golden_keys"


@pytest.fixture(scope="module", params=zoo.ZOO)
def name(request):
    if reason := zoo.missing(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def sixteen_bit(name, tmp_path_factory) -> Path:
    return zoo.save(name, tmp_path_factory.mktemp("zoo") / f"{name}.safetensors")


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def checkpoint(request, name, sixteen_bit):
    """One 4-bit model of the zoo, opened."""
    path = sixteen_bit.with_name(f"{name}_{request.param}.safetensors")
    recipe = Recipe(format=request.param, rank=16, alternations=1)
    quantize_model(ModelSource(load_pinned_model(str(sixteen_bit))), path, recipe)
    yield open_checkpoint(path)
    path.unlink()


def test_a_4bit_model_is_the_dense_model_of_its_weights(name, sixteen_bit, checkpoint):
    specs = checkpoint.specs
    assert checkpoint.provenance.family == zoo.ZOO[name].family
    assert (
        sum(spec.format != "awq_w4a16" for spec in specs.values()),
        sum(spec.format == "awq_w4a16" for spec in specs.values()),
    ) == zoo.ZOO[name].layers

    wanted = zoo.forward(zoo.dense(name, sixteen_bit, checkpoint), name)

    exact = load_model(str(checkpoint.path), compute="w16")
    assert len(exact.packed_layers()) == len(specs)
    keys = set(comfy.lora.model_lora_keys_unet(exact.model, {}).values())
    targets = {key[0] if isinstance(key, tuple) else key for key in keys}
    assert not exact.packed_layers().keys() - targets, "every packed layer can take a LoRA"
    assert relative(zoo.forward(exact, name), wanted) < EXACT

    rounded = zoo.forward(load_model(str(checkpoint.path), compute="w4a4"), name)
    assert rounded.isfinite().all()
    assert EXACT < relative(rounded, wanted) < LOOSE


def test_tables_say_what_the_layers_really_read(name, sixteen_bit):
    """Unsigned: nothing under the shift, but something under zero. Shared: the same tensor, and nobody else has it."""
    patcher = load_pinned_model(str(sixteen_bit))
    family = FAMILIES[zoo.ZOO[name].family]
    layers = {
        layer: module
        for layer, module in patcher.model.diffusion_model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (rule := family.rule(layer, *module.weight.shape)) is not None
        and rule.kind == "w4a4"
    }
    seen: dict[str, torch.Tensor] = {}
    for layer, module in layers.items():
        module.register_forward_pre_hook(lambda module, args, layer=layer: seen.setdefault(layer, args[0].clone()))
    zoo.forward(patcher, name)
    assert seen.keys() == layers.keys()

    same: dict[tuple[str, bytes], list[str]] = {}
    for layer, x in seen.items():
        # the text is the same tensor in all blocks, but a group is of one attention or MLP
        parent = layer.removesuffix(".0").rpartition(".")[0]
        same.setdefault((parent, hashlib.sha256(x.contiguous().numpy()).digest()), []).append(layer)
        start, stop = family.rule(layer, *layers[layer].weight.shape).act_unsigned
        if start != stop:
            assert -GELU_SHIFT < x[..., start:stop].min() < 0, layer
            assert start == 0 or x[..., :start].min() < -GELU_SHIFT, layer
        elif layers[layer].bias is not None and x.numel():
            assert x.min() < -GELU_SHIFT, f"{layer} could be unsigned"
    groups = {tuple(sorted(group)) for group in family.shared_groups(layers)}
    assert groups == {tuple(sorted(group)) for group in same.values() if len(group) > 1}


def test_recorded_names_are_those_of_this_comfyui(name):
    """tests/quantize reads the record without a ComfyUI. To write it anew: tests/nodes/record_keys.py"""
    recorded = json.loads((GOLDEN / f"{name}.json").read_text())
    assert recorded["linear"].items() <= zoo.skeleton(zoo.build(name))["linear"].items()


def test_every_family_is_in_the_zoo():
    assert {tiny.family for tiny in zoo.ZOO.values()} | {"generic"} == set(FAMILIES)


def test_a_model_without_a_table_works_through_the_generic_rule(monkeypatch, tmp_path):
    """Qwen-Image without its table: the same layers, but the modulation in 16 bit and nothing unsigned."""
    source = ModelSource(load_pinned_model(str(zoo.save("qwen_image", tmp_path / "16bit.safetensors"))))
    monkeypatch.setattr(FAMILIES["qwen_image"].__class__, "detect", lambda self, keys: False)
    assert detect(source.infos).name == "generic"
    report = quantize_model(source, tmp_path / "4bit.safetensors", Recipe(rank=16, alternations=1))
    assert report.family == "generic"
    specs = open_checkpoint(report.path).specs
    assert len(specs) == 24
    assert all(spec.act_unsigned == (0, 0) for spec in specs.values())
    patcher = load_model(str(report.path))
    assert {layer_name(key) for key in patcher.packed_layers()} == set(specs)
    assert torch.isfinite(zoo.forward(patcher, "qwen_image")).all()
