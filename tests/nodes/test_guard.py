"""NaN and Inf: named by layer, step and kernel, once, and mended or refused as the user chose."""

import logging
import re
import types

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.sd
import comfy.utils
from comfy_api.torch_helpers import set_torch_compile_wrapper
from safetensors.torch import load_file, save_file

from svdquant_pack.kernels import dispatch
from svdquant_pack.kernels.backends import Backend, discover, each_call, reference
from svdquant_pack.nodes.demo import SVDQuantDemoPrompt
from svdquant_pack.nodes.host.describe import describe_model
from svdquant_pack.nodes.host.guard import CHOICES, KEY, NumbersError
from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.nodes.host.source import ModelSource
from svdquant_pack.nodes.load_model import SVDQuantLoadModel
from svdquant_pack.quantize.files.tensor_file import TensorFile
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.sampling import LORAS, relative

STEPS, BAD_STEP = 6, 2
LAYER = "double_blocks.1.img_mlp.0"
EXACT = 1e-5


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_tested", {})


@pytest.fixture
def kernel(monkeypatch):
    """A backend that is right, except that `kernel.spoil(layer)` may put a NaN into the output: `calls` counts it."""
    kernel = types.SimpleNamespace(spoil=lambda layer: False, calls=0, spoiled=0)

    def claims(call):
        return 5000 if call.compute == "w4a4" else "knows w4a4"

    def linear(x, layer, bias, lora, compute):
        y = reference.linear(x, layer, bias, lora, compute)
        kernel.calls += 1
        if kernel.spoil(layer):
            kernel.spoiled += 1
            y[0, 3] = torch.nan
        return y

    found, absent = discover()
    both = found | {"faulty": Backend("faulty", claims, each_call(linear))}
    monkeypatch.setattr(dispatch, "discover", lambda: (both, absent))
    return kernel


def sample(patcher, cfg: float = 3.0, on_step=None, latent=None) -> torch.Tensor:
    """A latent by the host's own sampler, both halves of CFG in one batch; a sampler that draws noise at every step."""
    positive, negative = (SVDQuantDemoPrompt().encode(digits)[0] for digits in ("01", "77"))
    start = torch.zeros(2, 16, 8, 8) if latent is None else latent
    noise = comfy.sample.prepare_noise(start, 5)
    return comfy.sample.sample(
        patcher, noise, STEPS, cfg, "euler_ancestral", "simple", positive, negative, start, seed=5,
        callback=on_step, disable_pbar=True,
    ).cpu()  # fmt: skip


def spoil_at(kernel, patcher, steps) -> object:
    """Let the kernel fail in one layer at some steps; returns the sampler's callback that counts them."""
    wanted = patcher.packed_layers()[f"diffusion_model.{LAYER}.weight"]
    now = [0]

    def spoil(layer) -> bool:
        storages = (tensor.untyped_storage().data_ptr() for tensor in (layer["qweight"], wanted.weight))
        return now[0] in steps and next(storages) == next(storages)

    def on_step(step, *rest) -> None:
        now[0] = step + 1

    kernel.spoil = spoil
    return on_step


def test_a_kernel_that_gives_nan_is_named_once_and_the_picture_is_right(checkpoints, kernel, caplog):
    patcher = load_model(str(checkpoints["int4"]), "w4a4")
    right = sample(patcher)
    calls = kernel.calls
    on_step = spoil_at(kernel, patcher, range(BAD_STEP, STEPS))
    caplog.clear()
    assert torch.equal(sample(patcher, on_step=on_step), right), "noise of later steps included"
    (record,) = (record for record in caplog.records if record.name == "svdquant")
    assert record.levelno == logging.WARNING
    said = rf"faulty kernels: w4a4 of int4 on cpu is off: layer '{re.escape(LAYER)}' \(int4 at N=\d+, K=\d+, rank 16\) "
    said += rf"gave NaN or Inf at step {BAD_STEP + 1} of {STEPS} from finite input \(largest \|x\| \d[\d.e+-]*\)"
    assert re.match(said, record.getMessage()), record.getMessage()
    assert kernel.spoiled == 2, "in the call, and when it was repeated"
    assert kernel.calls < 2 * calls, "the kernel is off"
    layer = describe_model(patcher)["backends"][LAYER]
    assert layer["backend"] == "reference" and LAYER in layer["passed_over"]["faulty"]
    assert torch.equal(sample(patcher), right) and len(caplog.records) == 1


def test_stop_ends_the_run_and_names_the_layer(checkpoints, kernel):
    patcher = load_model(str(checkpoints["int4"]), "w4a4", if_not_finite="stop").clone()
    on_step = spoil_at(kernel, patcher, {BAD_STEP})
    with pytest.raises(NumbersError, match=rf"layer '{LAYER}' .* at step {BAD_STEP + 1} of {STEPS} .* faulty w4a4;"):
        sample(patcher, on_step=on_step)
    assert describe_model(patcher)["backends"][LAYER]["backend"] == "faulty", "what was not asked for is not done"


@pytest.mark.parametrize("then", CHOICES)
def test_what_is_gone_when_the_call_is_repeated_is_said(checkpoints, kernel, caplog, then):
    patcher = load_model(str(checkpoints["int4"]), "w4a4", if_not_finite=then)
    right, hits = sample(patcher), iter([True])
    kernel.spoil = lambda layer: next(hits, False)
    if then == "stop":
        with pytest.raises(NumbersError, match="did not when the same call was repeated"):
            sample(patcher)
        return
    assert torch.equal(sample(patcher), right)
    assert caplog.text.count("did not when the same call was repeated") == 1


def with_damaged_lora(patcher, layer: str):
    lora = comfy.utils.load_torch_file(str(LORAS / "svdquant_demo_inverted_kohya.safetensors"), safe_load=True)
    patched = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)[0]
    comfy.model_management.load_models_gpu([patched])
    module = patched.packed_layers()[f"diffusion_model.{layer}.weight"]
    module(torch.zeros(1, module.in_features))  # its factors are on the device now
    return patched, module


@pytest.mark.parametrize("then", CHOICES)
def test_a_lora_that_no_kernel_can_help_is_named(checkpoints, then):
    """Factors are refused when they are added; here one is damaged in memory."""
    patched, module = with_damaged_lora(load_model(str(checkpoints["int4"]), if_not_finite=then), LAYER)
    loaded = module._loaded
    tensors = [value for value in vars(loaded).values() if isinstance(value, torch.Tensor)]
    tensors += [part for value in vars(loaded).values() if isinstance(value, tuple) for part in value]
    next(tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.dim() == 2).fill_(torch.inf)
    with pytest.raises(NumbersError, match=rf"layer '{LAYER}' .* by plain torch: without its LoRAs it gives numbers"):
        sample(patched)
    assert module.loras is not None, "looking for the fault takes nothing off"


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A model without FLUX's own repair of float16, whose bias float16 just holds, and whose branch adds to it."""
    folder, layer = tmp_path_factory.mktemp("overflow"), "transformer_blocks.0.attn.to_q"
    source = ModelSource(load_pinned_model(str(zoo.save("qwen_image", folder / "source.safetensors"))))
    made = quantize_model(source, folder / "made.safetensors", Recipe(rank=16, alternations=1)).path
    tensors = load_file(made)
    tensors[f"{layer}.bias"] = torch.full_like(tensors[f"{layer}.bias"], 65000.0)
    tensors[f"{layer}.proj_up"] *= 3e4
    save_file(tensors, folder / "large.safetensors", dict(TensorFile(made).metadata))
    return folder / "large.safetensors", layer


def test_a_layer_that_overflows_by_itself(overflowing):
    """In float32 it runs; in float16 no kernel can help."""
    path, layer = overflowing
    patcher = load_model(str(path))
    apply_model = patcher.model.apply_model
    patcher.model.apply_model = lambda *args, transformer_options, **kwargs: apply_model(
        *args, transformer_options={"wrappers": patcher.wrappers}, **kwargs
    )
    assert zoo.forward(patcher, "qwen_image").isfinite().all()
    half = patcher.clone()
    half.set_model_compute_dtype(torch.float16)
    with pytest.raises(NumbersError, match=rf"layer '{layer}' .* beyond float16, where the 16-bit model overflows"):
        zoo.forward(half, "qwen_image")


def test_a_layer_of_the_host_is_told_from_ours(checkpoints):
    patcher = load_model(str(checkpoints["int4"]))
    with torch.no_grad():
        patcher.model.diffusion_model.img_in.weight[0, 0] = torch.inf
    with pytest.raises(NumbersError, match=r"the 16-bit layer 'img_in' \(\w+\) gave NaN or Inf at step 1 of 6"):
        sample(patcher)


def test_numbers_that_were_bad_before_the_model_are_said_to_be_so(checkpoints, caplog):
    patcher = load_model(str(checkpoints["int4"]), if_not_finite="stop")
    latent = torch.zeros(2, 16, 8, 8)
    latent[0, 0, 0, 0] = torch.nan
    assert not sample(patcher, latent=latent).isfinite().all()
    said = [record.getMessage() for record in caplog.records if record.name == "svdquant"]
    assert len(said) == 1 and "called with NaN or Inf in x (the latent) at step 1 of 6" in said[0], said


def test_a_compiled_model_is_watched_too(checkpoints, kernel, caplog):
    patcher = load_model(str(checkpoints["int4"]), "w4a4")
    compiled = patcher.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=[f"diffusion_model.{LAYER}"])
    right = sample(compiled)
    on_step = spoil_at(kernel, patcher, {BAD_STEP})
    assert relative(sample(compiled, on_step=on_step), right) < EXACT
    said = [record for record in caplog.records if record.name == "svdquant"]
    assert len(said) == 1 and f"layer '{LAYER}'" in said[0].getMessage()


def test_a_finite_call_is_made_once_and_arguments_are_left_as_they_are(checkpoints):
    patcher = load_model(str(checkpoints["int4"]))
    seen = []

    def count(executor, *args, **kwargs):
        seen.append(args)
        return executor(*args, **kwargs)

    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", count)
    sample(patcher)
    assert len(seen) == STEPS and KEY in patcher.clone().wrappers["apply_model"]


def test_the_choice_is_an_input_that_old_workflows_lack(checkpoints, monkeypatch):
    from svdquant_pack.nodes import load_model as node

    monkeypatch.setattr(node, "find_or_raise", lambda name: checkpoints[name])
    inputs = SVDQuantLoadModel.INPUT_TYPES()
    assert inputs["optional"]["if_not_finite"][0] == ["reference", "stop"] and list(inputs["required"])[-1] == "compute"
    (patcher,) = SVDQuantLoadModel().load("int4", "auto")
    assert patcher.cached_patcher_init[1][2] == "reference"
    (patcher,) = SVDQuantLoadModel().load("int4", "auto", if_not_finite="stop")
    assert patcher.wrappers["apply_model"][KEY][0].__self__.then == "stop"
    with pytest.raises(ValueError, match="if_not_finite is 'off', known are reference, stop"):
        SVDQuantLoadModel().load("int4", "auto", if_not_finite="off")
