"""Every kind of LoRA on every 4-bit layer, by the stock code path, against the dense model: per layer."""

import pytest
import torch

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.nodes.host.source import ModelSource
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.lora.deltas import LoraError
from svdquant_pack.quantize.lora.fit import LoraLimits
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.lora_files import (
    EXACT_KINDS,
    KINDS,
    as_file,
    dense_of,
    dense_weights,
    layer_errors,
    lora_of,
    slices_of,
    tensors_of,
    with_file,
)

EXACT = 1e-5  # float32 sums in another order
FITTED = 2e-4  # at most a millionth of the delta's energy is left out, and the delta is a tenth of the weight


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def pair(request, checkpoints, demo_file):
    """(4-bit FLUX model without activation rounding, dense model that holds its decoded weights)."""
    return load_model(str(checkpoints[request.param]), compute="w16"), dense_of(
        open_checkpoint(checkpoints[request.param]), demo_file
    )


def assert_equal_and_moved(pair, patched, bound: float) -> None:
    errors = layer_errors(*patched)
    worst = max(errors, key=errors.get)
    assert errors[worst] < bound, worst
    still = layer_errors(pair[0], patched[1])
    assert min(still.values()) > 1e-3, "the patch changes every layer"


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_in_every_layer(pair, kind):
    lora = lora_of((kind,), dense_weights(*pair))
    patched = [with_file(patcher, lora, 0.7) for patcher in pair]
    assert_equal_and_moved(pair, patched, EXACT if kind in EXACT_KINDS else FITTED)


@pytest.mark.parametrize("strength", [1.0, -0.6, -1.0, 1.7])
def test_any_strength(pair, strength):
    lora = lora_of(EXACT_KINDS, dense_weights(*pair))
    patched = [with_file(patcher, lora, strength) for patcher in pair]
    assert_equal_and_moved(pair, patched, EXACT)


def test_strength_0_is_the_model_itself(pair):
    lora = lora_of(KINDS, dense_weights(*pair))
    zero = pair[0].clone()
    zero.add_patches({key: ("diff", (weight,)) for key, weight in dense_weights(*pair).items()}, 0.0)
    zero = with_file(zero, lora, 0.0)
    assert not zero.layer_loras()


@pytest.mark.parametrize("order", [0, 3])
def test_two_at_once(pair, order):
    """DoRA and OFT act on the weight as the patches before them have left it, as they do in ComfyUI."""
    weights = dense_weights(*pair)
    first, second = (lora_of(KINDS, weights, seed) for seed in (order + 1, order + 2))
    patched = [with_file(with_file(patcher, first, 0.8), second, -0.3) for patcher in pair]
    assert max(layer_errors(*patched).values()) < FITTED


def test_two_files_with_the_same_keys_add_up(pair):
    weights = dense_weights(*pair)
    first, second = (lora_of(("lora",), weights, seed) for seed in (0, 1))
    assert first.keys() == second.keys()
    patched = [with_file(with_file(patcher, first, 0.8), second, -0.3) for patcher in pair]
    assert_equal_and_moved(pair, patched, EXACT)
    assert all(loras.rank == 32 for loras in patched[0].layer_loras().values())


def test_slices_of_fused_weights(pair):
    lora = slices_of(pair[0])
    assert len(lora) > 3 * 10
    patched = [with_file(patcher, lora, 1.3) for patcher in pair]
    assert max(layer_errors(*patched).values()) < EXACT
    widths = {key: loras.rank for key, loras in patched[0].layer_loras().items()}
    # q, k and v at rank 4 share a block of 16 columns; linear1 also has a name for the three of them together
    assert all(width == (32 if "linear1" in key else 16) for key, width in widths.items())


def test_a_function_on_the_rows_is_exact(pair):
    """The host swaps shift and scale of some layers this way."""
    key, weight = next(iter(dense_weights(*pair).items()))
    from comfy.weight_adapter import LoRAAdapter

    made = tensors_of("lora", weight, 3)
    adapter = LoRAAdapter(set(), (made["lora_up.weight"], made["lora_down.weight"], 2.0, None, None, None))
    patched = [patcher.clone() for patcher in pair]
    for patcher in patched:
        patcher.add_patches({(key, None, lambda delta: torch.cat(delta.chunk(2)[::-1])): adapter}, 0.9)
    assert layer_errors(*patched)[key] < EXACT


def test_a_patch_may_scale_the_models_own_weight(pair):
    lora = lora_of(("lora",), dense_weights(*pair))
    from comfy.lora import load_lora, model_lora_keys_unet

    patched = [patcher.clone() for patcher in pair]
    for patcher in patched:
        patches = load_lora(lora, model_lora_keys_unet(patcher.model, {}))
        patcher.add_patches(patches, 0.5)
        patcher.add_patches(patches, 0.4, 0.75)
    assert max(layer_errors(*patched).values()) < EXACT


def test_bias_and_unquantized_layers_take_the_hosts_way(pair):
    lora = {}
    for key, tensor in pair[1].model.state_dict().items():
        if key not in pair[0].packed_layers() and key.startswith("diffusion_model."):
            name, _, suffix = key.rpartition(".")
            lora |= {f"{name}.diff_b": 0.1 * torch.randn_like(tensor)} if suffix == "bias" else {}
            lora |= {f"{name}.diff": 0.1 * torch.randn_like(tensor)} if suffix == "weight" else {}
    patched = [with_file(patcher, lora, 0.5) for patcher in pair]
    assert max(layer_errors(*patched).values()) < EXACT
    assert min(layer_errors(pair[0], patched[1]).values()) > 1e-3, "every bias moved"
    from svdquant_pack.tests.nodes.sampling import forward, relative

    assert relative(*(forward(patcher) for patcher in patched)) < EXACT
    assert relative(forward(pair[0]), forward(patched[1])) > 0.01


def test_a_lora_may_widen_the_image_input(pair):
    """The canny and depth LoRAs do; the image input stays in 16 bit."""
    made = {"lora_up.weight": torch.randn(128, 4), "lora_down.weight": torch.randn(4, 128)}
    lora = {f"diffusion_model.img_in.{name}": tensor for name, tensor in made.items()}
    lora["diffusion_model.img_in.reshape_weight"] = torch.tensor([128, 128])
    import comfy.model_management

    patched = [with_file(patcher, lora, 1.0) for patcher in pair]
    for patcher in patched:
        comfy.model_management.load_models_gpu([patcher])
    widened = [patcher.model.diffusion_model.img_in.weight.clone() for patcher in patched]
    assert widened[0].shape == (128, 128)
    assert torch.equal(*widened)
    for patcher in pair:
        comfy.model_management.load_models_gpu([patcher])
        assert patcher.model.diffusion_model.img_in.weight.shape == (128, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_files_in_every_precision(pair, dtype, tmp_path):
    file = lora_of(EXACT_KINDS, dense_weights(*pair))
    lora = as_file({name: t.to(dtype) if t.ndim else t for name, t in file.items()}, tmp_path / "lora.safetensors")
    patched = [with_file(patcher, lora, 0.9) for patcher in pair]
    assert max(layer_errors(*patched).values()) < EXACT


def test_a_full_change_is_kept_to_the_stated_energy_or_refused(pair):
    weights = dense_weights(*pair)
    lora = lora_of(("diff",), weights)
    lora = {name: torch.randn_like(tensor) for name, tensor in lora.items()}
    strict = with_file(pair[0], lora, 1.0)
    strict.set_lora_limits(LoraLimits(max_rank=32))
    with pytest.raises(LoraError, match=r"double_blocks\.0\.img_attn\.\w+: .*'diff'.* keep \d+\.\d% .*at least 98.0%"):
        strict.layer_loras()
    loose = with_file(pair[0], lora, 1.0)
    loose.set_lora_limits(LoraLimits(max_rank=64, max_lost=0.99))
    notes = {}
    for key, loras in loose.layer_loras(notes=notes).items():
        delta = lora[key.removesuffix(".weight") + ".diff"]
        found = loras.dense_weight(weights[key]) - weights[key]
        lost = ((found - delta).norm() / delta.norm()).square().item()
        assert lost == pytest.approx(1 - notes[key][0].kept, abs=0.02)
        assert 0.01 < lost < 0.99


FAMILIES = [name for name in zoo.ZOO if name != "flux"]  # the demo is FLUX


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_every_kind(name, tmp_path):
    """The kinds are dealt out over the layers, in two files at once."""
    if reason := zoo.missing(name):
        pytest.skip(reason)
    path = zoo.save(name, tmp_path / "16bit.safetensors")
    source = ModelSource(load_pinned_model(str(path)))
    quantize_model(source, tmp_path / "4bit.safetensors", Recipe(rank=16, alternations=1))
    checkpoint = open_checkpoint(tmp_path / "4bit.safetensors")
    pair = load_model(str(checkpoint.path), compute="w16"), dense_of(checkpoint, path)
    weights = dense_weights(*pair)
    dealt = set()
    for seed, strengths in ((0, (1.0, 0.0)), (4, (-0.5, 1.6))):
        dealt |= {KINDS[(index + seed) % len(KINDS)] for index in range(len(weights))}
        files = [lora_of(KINDS, weights, seed), {**lora_of(("lora",), weights, seed + 1), **slices_of(pair[0])}]
        patched = pair
        for file, strength in zip(files, strengths, strict=True):
            patched = [with_file(patcher, file, strength) for patcher in patched]
        errors = layer_errors(*patched)
        worst = max(errors, key=errors.get)
        assert errors[worst] < FITTED, worst
        assert min(layer_errors(pair[0], patched[1]).values()) > 1e-3, "every layer changes"
    assert dealt == set(KINDS), "the model has too few layers to show every kind"


def test_a_lora_at_strength_0_beside_another_comes_back(pair):
    weights = dense_weights(*pair)
    first, second = (lora_of(("lora",), weights, seed) for seed in (5, 6))
    for strengths in ((0.8, 0.0), (0.8, -0.3), (0.0, 0.5)):
        patched = [with_file(with_file(patcher, first, strengths[0]), second, strengths[1]) for patcher in pair]
        assert_equal_and_moved(pair, patched, EXACT)


def test_the_short_way_to_another_strength_is_the_long_way(pair):
    """Plain LoRAs of whole weights take it, everything else is looked at again; both give the dense model's output."""
    from svdquant_pack.nodes.host.patch import known_loras

    weights = dense_weights(*pair)
    store = pair[0].model.svdquant.store
    for file, short in (
        (lora_of(("lora",), weights, 7), True),
        (slices_of(pair[0], 7), False),
        (lora_of(("dora_out", "locon_mid", "loha"), weights, 7), False),
    ):
        for strength in (0.7, -0.4):
            patched = [with_file(patcher, file, strength) for patcher in pair]
            assert max(layer_errors(*patched).values()) < EXACT
            known = [known_loras(store, key, patched[0].patches[key]) for key in patched[0].layer_loras()]
            assert all((loras is not None) == short for loras in known)


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr_low"])
def test_dora_of_every_kind_that_has_it(pair, kind):
    key, weight = next(iter(dense_weights(*pair).items()))
    made = {f"{key.removesuffix('.weight')}.{name}": tensor for name, tensor in tensors_of(kind, weight, 8).items()}
    made[f"{key.removesuffix('.weight')}.dora_scale"] = weight.norm(dim=1, keepdim=True) * 1.1
    patched = [with_file(patcher, made, 0.8) for patcher in pair]
    assert layer_errors(*patched)[key] < EXACT
    assert layer_errors(pair[0], patched[1])[key] > 0.05, "the magnitude alone is a tenth more"


def test_what_the_host_only_complains_of_is_an_error(pair):
    """Its adapters log and leave the weight as it was: a picture without the LoRA, and nobody knows why."""
    from comfy.weight_adapter import LoRAAdapter

    key, weight = next(iter(dense_weights(*pair).items()))
    broken = LoRAAdapter(set(), (torch.ones(weight.shape[0], 4), torch.ones(4, 3), 1.0, None, None, None))
    patched = pair[0].clone()
    patched.add_patches({(key, None, torch.tanh): broken}, 1.0)
    with pytest.raises(LoraError, match=r"the patch of kind 'lora': ComfyUI cannot apply it \(.+\)"):
        patched.layer_loras()


def test_a_change_that_widens_a_4bit_weight_is_refused(pair):
    key, weight = next(iter(dense_weights(*pair).items()))
    n, k = weight.shape
    patched = pair[0].clone()
    patched.add_patches({key: ("diff", (torch.ones(n, 2 * k), {"pad_weight": True}))})
    with pytest.raises(LoraError, match=rf"changes the weight's shape to \({n}, {2 * k}\); a 4-bit weight is fixed"):
        patched.layer_loras()


@pytest.mark.parametrize("apart", ["w1", "w2", "both", "neither"])
def test_alpha_of_a_lokr_is_over_the_rank_of_what_is_taken_apart(pair, apart):
    """Of the right factor where both are, and nothing where none is: as the host has it."""
    key, weight = next(iter(dense_weights(*pair).items()))
    n, k = weight.shape
    noise = torch.Generator().manual_seed(11)
    made = {"alpha": torch.tensor(3.0)}
    for name, shape, rank in (("w1", (8, 8), 2), ("w2", (n // 8, k // 8), 5)):
        if apart in (name, "both"):
            made[f"lokr_{name}_a"] = 0.2 * torch.randn(shape[0], rank, generator=noise)
            made[f"lokr_{name}_b"] = torch.randn(rank, shape[1], generator=noise)
        else:
            made[f"lokr_{name}"] = 0.2 * torch.randn(*shape, generator=noise)
    file = {f"{key.removesuffix('weight')}{name}": tensor for name, tensor in made.items()}
    patched = [with_file(patcher, file, 0.6) for patcher in pair]
    assert layer_errors(*patched)[key] < EXACT
    assert layer_errors(pair[0], patched[1])[key] > 0.01


def test_what_has_an_exact_form_is_never_approximated(pair):
    notes, strict = {}, with_file(pair[0], lora_of(EXACT_KINDS, dense_weights(*pair)), 1.0)
    strict.set_lora_limits(LoraLimits(max_rank=16, max_lost=0.0))
    strict.layer_loras(notes=notes)
    assert notes.keys() == strict.packed_layers().keys()
    assert {note.kept for of_layer in notes.values() for note in of_layer} == {1.0}


def test_a_function_that_mixes_columns_a_little_is_not_taken_for_one_on_rows(pair):
    from comfy.weight_adapter import LoRAAdapter

    key, weight = next(iter(dense_weights(*pair).items()))
    made = tensors_of("lora", weight, 3)
    adapter = LoRAAdapter(set(), (made["lora_up.weight"], made["lora_down.weight"], 2.0, None, None, None))
    patched = [patcher.clone() for patcher in pair]
    for patcher in patched:
        patcher.add_patches({(key, None, lambda delta: delta + 0.02 * delta.roll(1, 1)): adapter}, 0.9)
    assert layer_errors(*patched)[key] < FITTED


def test_another_model_as_a_lora_is_its_difference_from_the_models_own_weight(pair):
    """W' = W + strength * (other - W), whatever other patches there are."""
    key, module = next(iter(pair[0].packed_layers().items()))
    weight = module.four_bit.layer(module.blob).dense_weight()  # the dense model's may have a patch in it by now
    lora = lora_of(("lora",), {key: weight}, 9)
    first = with_file(pair[0], lora, 0.7)
    delta = first.layer_loras()[key].dense_weight(weight) - weight
    patched = first.clone()
    patched.add_patches({key: ("model_as_lora", (weight + 2 * delta,))}, 0.4)
    found = patched.layer_loras()[key].dense_weight(weight) - weight
    assert ((found - 1.8 * delta).norm() / delta.norm()).item() < FITTED


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_function_that_is_no_multiple_of_its_argument_is_made_at_its_strength(pair, kind):
    from comfy.lora import load_lora

    key, weight = next(iter(dense_weights(*pair).items()))
    made = {f"{key.removesuffix('.weight')}.{name}": tensor for name, tensor in tensors_of(kind, weight, 12).items()}
    (adapter,) = load_lora(made, {key.removesuffix(".weight"): key}).values()
    patched = [patcher.clone() for patcher in pair]
    for patcher in patched:
        patcher.add_patches({(key, None, lambda delta: (50 * delta).tanh() / 50): adapter}, 0.4)
    patched[0].set_lora_limits(LoraLimits(max_rank=256, max_lost=1e-6))
    assert layer_errors(*patched)[key] < FITTED
    assert layer_errors(pair[0], patched[1])[key] > 0.01


def test_patches_are_told_apart_by_their_tensors_and_not_by_what_those_hold():
    from comfy.weight_adapter import LoRAAdapter

    from svdquant_pack.nodes.host.patch import Patch

    one, other = torch.ones(2, 2), torch.ones(2, 2)
    for wrap in (
        lambda tensor: ("diff", (tensor,)),
        lambda tensor: (tensor,),
        lambda tensor: LoRAAdapter(set(), (tensor, one, 0.5, None, None, None)),
    ):
        patches = [
            Patch(strength, wrap(tensor), 1.0, None, None) for strength, tensor in ((1, one), (2, one), (1, other))
        ]
        assert patches[0].identity() == patches[1].identity() != patches[2].identity()
        assert patches[2].tensors()[0] is other


@pytest.mark.parametrize("kind", ["lora", "lokr", "diff"])
def test_what_has_run_stays_at_strength_0_and_changes_nothing(pair, kind):
    """What torch.compile made of the layer serves on; what starts at 0 is left out."""
    weights = dense_weights(*pair)
    file = lora_of((kind,), weights, 13)
    assert not with_file(pair[0], file, 0.0).layer_loras()
    ran = with_file(pair[0], file, 0.7).layer_loras()
    still = with_file(pair[0], file, 0.0).layer_loras()
    assert still.keys() == ran.keys() == weights.keys()
    for key, loras in still.items():
        assert set(loras.scales) == {0.0} and loras.deltas[0] is ran[key].deltas[0]
        assert torch.equal(loras.dense_weight(weights[key]), weights[key])
