"""Stock LoRA nodes on a 4-bit model: exact, per layer and at the end, and gone without a trace."""

import logging

import pytest
import torch

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.model_management
import comfy.sd
import comfy.utils

from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.nodes.host.patcher import layer_name
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.lora.deltas import LoraError
from svdquant_pack.quantize.lora.fit import LoraLimits
from svdquant_pack.tests.nodes.sampling import LORAS, forward, relative

EXACT = 1e-5  # float32 sums in another order
SPELLINGS = ("svdquant_demo_inverted_kohya", "svdquant_demo_inverted_diffusers")


def with_lora(patcher, spelling: str, strength: float):
    """What the stock LoraLoaderModelOnly node does."""
    lora = comfy.utils.load_torch_file(str(LORAS / f"{spelling}.safetensors"), safe_load=True)
    return comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0]


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def pair(request, checkpoints, demo_file):
    """(4-bit model without activation rounding, dense model that holds its decoded weights)."""
    checkpoint = open_checkpoint(checkpoints[request.param])
    dense = load_pinned_model(str(demo_file))
    for name in checkpoint.specs:
        layer, module = checkpoint.layer(name), comfy.utils.get_attr(dense.model.diffusion_model, name)
        module.weight.data = layer.dense_weight()
        module.bias.data = layer.unshifted_bias(checkpoint.tensor(f"{name}.bias")).float()
    return load_model(str(checkpoints[request.param]), compute="w16"), dense


def loaded(patcher) -> list[str]:
    """4-bit layers that have LoRAs."""
    return [layer_name(key) for key, module in patcher.packed_layers().items() if module.loras is not None]


def columns(patcher) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """weight key -> (lora_down, lora_up) of all active LoRAs of a 4-bit layer, strengths folded in."""
    layers = patcher.packed_layers()
    return {key: loras.columns(layers[key].packed.spec) for key, loras in patcher.layer_loras().items()}


def assert_same_layers(four_bit, dense) -> None:
    """Every 4-bit layer as it is loaded now gives what the dense layer gives."""
    generator = torch.Generator().manual_seed(0)
    for key, module in four_bit.packed_layers().items():
        other = comfy.utils.get_attr(dense.model.diffusion_model, layer_name(key))
        x = torch.randn(3, 5, module.in_features, generator=generator).to(four_bit.load_device)
        assert relative(module(x), other(x)) < EXACT, key


def test_without_lora_it_is_the_dense_model(pair):
    four_bit, dense = pair
    assert relative(forward(four_bit), forward(dense)) < EXACT
    assert_same_layers(four_bit, dense)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_a_stock_lora_is_exact_in_every_layer(pair, spelling, strength):
    four_bit, dense = (with_lora(patcher, spelling, strength) for patcher in pair)
    moved = forward(four_bit)
    assert relative(moved, forward(dense)) < EXACT
    assert_same_layers(four_bit, dense)
    assert len(loaded(four_bit)) == 20, "every attention and MLP layer of the four blocks"
    assert relative(moved, forward(pair[0])) > 0.05, "the LoRA changes the picture"


def test_two_loras_add_up_in_any_order(pair):
    outputs = []
    for order in (SPELLINGS, SPELLINGS[::-1]):
        four_bit, dense = pair
        for spelling, strength in zip(order, (0.8, -0.3) if order is SPELLINGS else (-0.3, 0.8), strict=True):
            four_bit, dense = with_lora(four_bit, spelling, strength), with_lora(dense, spelling, strength)
        outputs.append(forward(four_bit))
        assert relative(outputs[-1], forward(dense)) < EXACT
    assert relative(*outputs) < EXACT


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_a_removed_lora_leaves_no_trace(checkpoints, format):
    plain = load_model(str(checkpoints[format]))
    before = forward(plain)
    stored = {key: module.weight.detach().clone() for key, module in plain.packed_layers().items()}
    strong = with_lora(plain, SPELLINGS[0], 1.0)
    assert not torch.equal(forward(strong), before)
    assert torch.equal(forward(plain), before), "the clone's LoRA stays with the clone"
    assert not loaded(plain)
    comfy.model_management.unload_all_models()
    assert torch.equal(forward(plain), before)
    assert all(torch.equal(module.weight, stored[key]) for key, module in plain.packed_layers().items())


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_a_lora_adds_its_exact_delta_to_a_layer_that_rounds_its_activations(checkpoints, format):
    plain = load_model(str(checkpoints[format]), compute="w4a4")
    strong = with_lora(plain, SPELLINGS[0], 1.0)
    inputs = {key: torch.randn(4, module.in_features) for key, module in plain.packed_layers().items()}
    results = []
    for patcher in (plain, strong):
        comfy.model_management.load_models_gpu([patcher])
        results.append({key: module(inputs[key]) for key, module in patcher.packed_layers().items()})
    checked = 0
    for key, (down, up) in columns(strong).items():
        delta = inputs[key] @ down @ up.T
        assert relative(results[1][key] - results[0][key], delta) < EXACT, key
        checked += 1
    assert checked == 20


def test_half_loaded_is_the_same_model(checkpoints, caplog):
    """Partly offloaded layers keep their LoRAs, and the host never tries to patch packed bytes."""
    patcher = with_lora(load_model(str(checkpoints["int4"])), SPELLINGS[1], 0.7)
    whole = forward(patcher)
    comfy.model_management.unload_all_models()
    with caplog.at_level(logging.WARNING):
        patcher.patch_model(patcher.load_device, lowvram_model_memory=patcher.model_size() // 2)
        patcher.partially_unload(patcher.offload_device, 200_000)
    packed = patcher.packed_layers().values()
    assert not any(module.weight_function for module in packed)
    assert len(loaded(patcher)) == 20
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert torch.equal(forward(patcher), whole)


def test_memory_of_the_loras_is_asked_for(checkpoints):
    plain = load_model(str(checkpoints["int4"]))
    strong = with_lora(plain, SPELLINGS[0], 1.0)
    shape = (1, 16, 8, 8)
    factors = sum(2 * (down.numel() + up.numel()) for down, up in columns(strong).values())
    assert strong.memory_required(shape) - plain.memory_required(shape) >= 0.9 * factors


def test_model_size_is_what_the_checkpoint_holds(checkpoints):
    patcher = load_model(str(checkpoints["int4"]))
    assert patcher.model_size() == sum(tensor.nbytes for tensor in patcher.model_state_dict().values())
    assert patcher.model_size() < 1.1 * checkpoints["int4"].stat().st_size * 2  # the rest is float32 on a CPU


BAD = {
    "shape": lambda up, down: (up[:-1], down),
    "NaN": lambda up, down: (up * float("nan"), down),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_lora_that_does_not_fit_names_the_layer(checkpoints, kind):
    from comfy.weight_adapter import LoRAAdapter

    patcher = load_model(str(checkpoints["int4"])).clone()
    before = forward(patcher)
    up, down = BAD[kind](torch.randn(128, 4), torch.randn(4, 128))
    key = "diffusion_model.double_blocks.0.img_attn.proj.weight"
    patched = patcher.clone()
    patched.add_patches({key: LoRAAdapter(set(), (up, down, 4.0, None, None, None))})
    with pytest.raises(LoraError, match=r"double_blocks\.0\.img_attn\.proj"):
        forward(patched)
    assert torch.equal(forward(patcher), before)


def test_a_patch_without_a_low_rank_form_is_refused_by_name(checkpoints):
    patcher = load_model(str(checkpoints["int4"])).clone()
    patcher.add_patches({"diffusion_model.single_blocks.1.linear2.weight": ("diff", (torch.randn(128, 640),))})
    patcher.set_lora_limits(LoraLimits(max_rank=32))  # the layer is so small that all its columns are fewer than usual
    with pytest.raises(LoraError, match=r"single_blocks\.1\.linear2.*diff"):
        forward(patcher)
