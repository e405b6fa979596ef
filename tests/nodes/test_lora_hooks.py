"""LoRAs that act where a conditioning asks for them: scheduled, masked, several groups; against the dense model."""

import pytest
import torch

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.hooks
import comfy.model_management

from svdquant_pack.nodes.demo import SVDQuantDemoDecode, SVDQuantDemoPrompt
from svdquant_pack.nodes.host.lora_report import describe_loras
from svdquant_pack.nodes.host.model import load_model
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.lora.deltas import LoraError
from svdquant_pack.tests.nodes.lora_files import dense_of, dense_weights, lora_of, with_file
from svdquant_pack.tests.nodes.sampling import LORAS, relative

STEPS = 4
EXACT = 5e-5  # float32 sums in another order, through STEPS steps
KINDS = ("lora", "lokr", "dora_out", "loha")


@pytest.fixture(scope="module")
def pair(checkpoints, demo_file):
    checkpoint = open_checkpoint(checkpoints["int4"])
    return load_model(str(checkpoints["int4"]), compute="w16"), dense_of(checkpoint, demo_file)


def hook_of(lora, strength: float, keyframes=()):
    hooks = comfy.hooks.create_hook_lora(lora, strength, 0.0)
    if keyframes:
        group = comfy.hooks.HookKeyframeGroup()
        for start, factor in keyframes:
            group.add(comfy.hooks.HookKeyframe(strength=factor, start_percent=start))
        hooks.set_keyframes_on_hooks(group)
    return hooks


def sample(patcher, positive, negative, count: int = 1, seed: int = 3) -> torch.Tensor:
    import nodes

    latent = {"samples": torch.zeros(count, 16, 8, 8)}
    return nodes.common_ksampler(patcher, seed, STEPS, 2.0, "euler", "simple", positive, negative, latent)[0]["samples"]


def prompt():
    return SVDQuantDemoPrompt().encode("01")[0]


def assert_hooks_gone(patcher) -> None:
    assert not patcher.model.svdquant.unhooked
    assert patcher.current_hooks is None
    assert not patcher.svdquant_groups, "what a run registers does not add up"


CASES = {
    "one group": ((0.9, ()),),
    "scheduled": ((1.0, ((0.0, 0.0), (0.3, 1.0), (0.6, -0.5))),),
    "two groups": ((0.9, ()), (-0.7, ())),
    "two scheduled": ((1.0, ((0.0, 1.0), (0.5, 0.2))), (0.8, ((0.0, 0.3), (0.4, 1.2)))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", [False, True], ids=["alone", "over a loaded LoRA"])
def test_hook_loras_give_the_dense_models_pictures(pair, case, base):
    """One group runs without a cache of weights (MinVram), several with one (MaxSpeed)."""
    weights = dense_weights(*pair)
    files = [lora_of(KINDS, weights, seed) for seed in range(3)]
    outputs = []
    for patcher in pair:
        patcher = with_file(patcher, files[2], 0.5) if base else patcher
        settings = [hook_of(file, *case) for file, case in zip(files, CASES[case], strict=False)]
        positive = comfy.hooks.set_hooks_for_conditioning(prompt(), settings[0])
        negative = comfy.hooks.set_hooks_for_conditioning(prompt(), settings[-1] if len(settings) > 1 else None)
        plain = sample(patcher, prompt(), prompt())
        hooked = sample(patcher, positive, negative)
        assert relative(hooked, plain) > 0.01, "the hook changes the picture"
        if patcher.model is pair[0].model:
            assert torch.equal(sample(patcher, prompt(), prompt()), plain), "and is gone afterwards"
            assert torch.equal(sample(patcher, positive, negative), hooked)
        outputs.append(hooked)
    assert relative(*outputs) < EXACT
    assert_hooks_gone(pair[0])


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_a_scheduled_lora_gives_the_16bit_models_pictures(checkpoints, demo_model, format):
    """A trained LoRA whose strength changes twice, 4-bit activations: the error is no more than those of the two models
    that the schedule passes through, without the LoRA and with it."""
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(LORAS / "svdquant_demo_inverted_kohya.safetensors"), safe_load=True)
    hooks = hook_of(lora, 1.0, ((0.0, 0.0), (0.3, 1.0), (0.7, 0.4)))
    scheduled = comfy.hooks.set_hooks_for_conditioning(prompt(), hooks)

    def paint(patcher, positive=None) -> torch.Tensor:
        """40 pictures: with ten of one seed the last bit of a processor's sums decides"""
        drawn = [sample(patcher, positive or prompt(), prompt(), 10, seed) for seed in range(3, 7)]
        return SVDQuantDemoDecode().decode({"samples": torch.cat(drawn)})[0]

    four_bit = load_model(str(checkpoints[format]), compute="w4a4")
    found, plain, loaded = (
        (paint(mine, *conditioning), paint(dense, *conditioning))
        for mine, dense, conditioning in (
            (four_bit, demo_model, (scheduled,)),
            (four_bit, demo_model, ()),
            (with_file(four_bit, lora, 1.0), with_file(demo_model, lora, 1.0), ()),
        )
    )
    error = relative(*found)
    assert error < relative(*plain) + relative(*loaded), (error, relative(*plain), relative(*loaded))
    assert all(relative(found[1], other[1]) > 3 * error for other in (plain, loaded)), "the schedule is neither of them"


def test_a_lora_masked_to_a_part_of_the_picture(pair):
    file = lora_of(KINDS, dense_weights(*pair))
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    outputs = []
    for patcher in pair:
        (left,) = comfy.hooks.set_conds_props([prompt()], 1.0, "default", mask, hook_of(file, 1.2))
        (right,) = comfy.hooks.set_conds_props([prompt()], 1.0, "default", 1 - mask)
        outputs.append(sample(patcher, left + right, prompt()))
        assert relative(outputs[-1], sample(patcher, prompt(), prompt())) > 0.01
    assert relative(*outputs) < EXACT
    assert_hooks_gone(pair[0])


def test_a_change_of_a_scheduled_strength_makes_no_factor_anew(pair, monkeypatch):
    from svdquant_pack.quantize.lora import terms

    file = lora_of(("lora",), dense_weights(*pair))
    hooks = hook_of(file, 1.0, ((0.0, 0.1), (0.2, 0.4), (0.5, 0.9)))
    positive = comfy.hooks.set_hooks_for_conditioning(prompt(), hooks)
    made = []
    original = terms.columns_of
    monkeypatch.setattr(terms, "columns_of", lambda *args: made.append(args) or original(*args))
    sample(pair[0], positive, prompt())
    assert len(made) == len(pair[0].packed_layers())


def test_memory_of_hook_loras_is_counted(pair):
    file = lora_of(KINDS, dense_weights(*pair))
    patcher = pair[0].clone()
    before = patcher.model_size()
    hooks = hook_of(file, 1.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    patcher.register_all_hook_patches(hooks, target, {})
    found = describe_loras(patcher)
    assert [row["name"] for row in found["rows"]] == ["hook LoRA 1"]
    assert found["rows"][0]["applied"] == found["of"]
    assert patcher.model_size() - before == 4 * sum(
        b.numel for b in with_file(pair[0], file, 1.0).layer_loras().values()
    )


def test_a_hook_that_cannot_be_applied_is_refused_by_name(pair):
    file = {"diffusion_model.single_blocks.1.linear2.lora_up.weight": torch.ones(64, 4)}
    file["diffusion_model.single_blocks.1.linear2.lora_down.weight"] = torch.ones(4, 64)
    positive = comfy.hooks.set_hooks_for_conditioning(prompt(), hook_of(file, 1.0))
    plain = sample(pair[0], prompt(), prompt())
    with pytest.raises(LoraError, match=r"single_blocks\.1\.linear2"):
        sample(pair[0], positive, prompt())
    assert torch.equal(sample(pair[0], prompt(), prompt()), plain)


def test_another_model_as_a_lora_is_refused_by_name(pair, demo_model):
    from svdquant_pack.quantize.lora.fit import LoraLimits

    weights = comfy.hooks.get_patch_weights_from_model(demo_model)
    hooks = comfy.hooks.create_hook_model_as_lora(weights, None, 1.0, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(prompt(), hooks)
    strict = pair[0].clone()
    strict.set_lora_limits(LoraLimits(max_rank=16))
    with pytest.raises(LoraError, match=r"'model_as_lora'.*keep \d+\.\d% of its energy"):
        sample(strict, positive, prompt())


def test_a_hook_reaches_16bit_and_4bit_layers_alike(pair):
    weights = dense_weights(*pair)
    noise = torch.Generator().manual_seed(5)
    file = {
        "diffusion_model.img_in.lora_up.weight": 0.3 * torch.randn(128, 4, generator=noise),
        "diffusion_model.img_in.lora_down.weight": torch.randn(4, 64, generator=noise),
    }
    outputs, apart = [], []
    for patcher in pair:
        positive = comfy.hooks.set_hooks_for_conditioning(prompt(), hook_of({**lora_of(KINDS, weights), **file}, 0.9))
        without = comfy.hooks.set_hooks_for_conditioning(prompt(), hook_of(lora_of(KINDS, weights), 0.9))
        outputs.append(sample(patcher, positive, prompt()))
        apart.append(relative(outputs[-1], sample(patcher, without, prompt())))
    assert relative(*outputs) < EXACT and min(apart) > 100 * EXACT
    assert_hooks_gone(pair[0])
