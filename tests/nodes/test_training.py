"""ComfyUI's own node TrainLora on a 4-bit model, beside the same node on the dense model of the decoded weights.

On a 16-bit model the node passes for the families of CONTROL; not for those whose blocks add to an activation in place,
FLUX among them: torch refuses the backward of ComfyUI's own code, in 16 bit too.
"""

import inspect
from functools import partial

import numpy
import pytest
import torch
from torch.nn.functional import linear

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.model_management
import comfy.ops
import comfy.utils
import folder_paths
from comfy_extras import nodes_train
from safetensors.torch import save_file

from svdquant_pack.kernels import svdquant_linear
from svdquant_pack.nodes.host import training
from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.lora.deltas import LoraError
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.lora_files import dense_weights, lora_of, with_file
from svdquant_pack.tests.nodes.sampling import relative
from svdquant_pack.tests.nodes.zoo_models import TOKENS, ZOO

CONTROL = ("qwen_image", "wan_t2v", "z_image", "sd3", "lumina2", "auraflow")
NOT_SERVED = "sd3"  # not in inference mode, as a server loads it: norms inside its attention are none of ComfyUI's ops
FAMILY = "auraflow"  # it has no rotary embedding, see `NO_BACKWARD`
NO_BACKWARD = "through comfy_kitchen.apply_rope"  # ComfyUI 0.8 has that from comfy-kitchen
STEPS = 50
DEFAULTS = {
    "batch_size": 1,
    "steps": 4,
    "grad_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "rank": 4,
    "optimizer": "AdamW",
    "loss_function": "MSE",
    "seed": 0,
    "training_dtype": "fp32",
    "lora_dtype": "fp32",
    "algorithm": "LoRA",
    "gradient_checkpointing": False,
    "existing_lora": "[None]",
    # newer hosts
    "quantized_backward": False,
    "checkpoint_depth": 1,
    "offloading": False,
    "bucket_mode": False,
    "bypass_mode": False,
}
KNOWN = inspect.signature(nodes_train.TrainLoraNode.execute).parameters


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return zoo.save(FAMILY, tmp_path_factory.mktemp("training") / "source.safetensors")


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def checkpoint(request, source):
    path = source.with_name(f"{request.param}.safetensors")
    quantize_model(FileSource(source), path, Recipe(format=request.param, rank=16, alternations=1))
    return path


def train(patcher, name: str = FAMILY, **settings) -> tuple:
    """What ComfyUI's node makes of two latents: the LoRA, the losses, and from older hosts a MODEL."""
    tiny, generator = ZOO[name], torch.Generator().manual_seed(0)
    latents = [{"samples": torch.randn(tiny.latent, generator=generator)} for _ in "12"]
    extra = {"pooled_output": torch.randn(tiny.extra["y"], generator=generator)} if "y" in tiny.extra else {}
    positive = [[torch.randn(1, TOKENS, tiny.text, generator=generator), extra] for _ in "12"]
    lists = {key: [value] for key, value in {**DEFAULTS, **settings}.items() if key in KNOWN}
    torch.manual_seed(0)
    with torch.inference_mode(name != NOT_SERVED):
        output = nodes_train.TrainLoraNode.execute(model=[patcher], latents=latents, positive=[positive], **lists)
    *model, lora, losses, _ = output.args
    return lora, losses["loss"], *model


@torch.inference_mode()
def four_bit_model(path, compute: str = "w16"):
    """As a server's prompt loads it."""
    return load_model(str(path), compute=compute)


@torch.inference_mode()
def dense_model(checkpoint, source, disable_dynamic: bool = False):
    patcher = zoo.dense(FAMILY, source, open_checkpoint(checkpoint))
    patcher.cached_patcher_init = (dense_model, (checkpoint, source))
    return patcher


@pytest.mark.parametrize("name", CONTROL)
def test_the_hosts_node_trains_the_16_bit_model(name, tmp_path):
    with torch.inference_mode(name != NOT_SERVED):
        patcher = load_pinned_model(str(zoo.save(name, tmp_path / "m.safetensors")))
    try:
        lora, losses, *_ = train(patcher, name)
    except RuntimeError as error:
        if NO_BACKWARD not in str(error):
            raise
        pytest.skip(f"this ComfyUI trains no {name} in 16 bit: {error}")
    downs = [tensor for key, tensor in lora.items() if key.endswith("lora_down.weight")]
    assert len(losses) == 4 and any(tensor.abs().max() > 0 for tensor in downs), "they start at zero"


@pytest.fixture(scope="module")
def dense(checkpoint, source):
    """The dense model of the decoded weights, and what the node trains on it."""
    patcher = dense_model(checkpoint, source)
    return patcher, *train(patcher, steps=STEPS)[:2]


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-3) -> None:
    """Every tensor of two LoRAs; some stay zero, as nothing reads their layer."""
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert tensor.shape == wanted[key].shape, key
        assert torch.dist(tensor, wanted[key]) <= tolerance * wanted[key].norm(), key


def test_w16_trains_the_lora_of_the_dense_model(checkpoint, dense):
    other, wanted, losses_of_dense = dense
    patcher = four_bit_model(checkpoint)
    lora, losses, *_ = train(patcher, steps=STEPS)
    assert_same(lora, wanted)
    downs = [tensor for key, tensor in lora.items() if key.endswith("lora_down.weight")]
    assert sum(down.abs().max() > 1e-3 for down in downs) > len(downs) / 2, "trained"
    assert losses == pytest.approx(losses_of_dense, rel=1e-3)
    loaded = zoo.forward(with_file(patcher, lora, 1.0), FAMILY)
    assert relative(loaded, zoo.forward(with_file(other, lora, 1.0), FAMILY)) < 1e-4
    assert relative(loaded, zoo.forward(patcher, FAMILY)) > 0.01, "the LoRA does something"


def test_w4a4_learns_what_the_16_bit_model_learns(checkpoint, dense):
    other, _, losses_of_dense = dense
    patcher = four_bit_model(checkpoint, "w4a4")
    lora, losses, *_ = train(patcher, steps=STEPS)
    assert sum(losses[-10:]) == pytest.approx(sum(losses_of_dense[-10:]), rel=0.1)
    for model in (patcher, other):
        assert relative(zoo.forward(with_file(model, lora, 1.0), FAMILY), zoo.forward(model, FAMILY)) > 0.01


def straight_through_model(checkpoint, source, disable_dynamic: bool = False):
    """The dense model in plain torch whose layers take what rounding changes as a constant."""
    patcher, opened = dense_model(checkpoint, source), open_checkpoint(checkpoint)
    patcher.cached_patcher_init = (straight_through_model, (checkpoint, source))
    for name in opened.specs:
        module, layer = comfy.utils.get_attr(patcher.model.diffusion_model, name), opened.layer(name)
        stored = None if module.bias is None else opened.tensor(f"{name}.bias").float()
        module.forward = partial(straight_through, module, layer, stored)
    return patcher


def straight_through(module, layer, stored, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        exact = linear(x, layer.dense_weight(), layer.unshifted_bias(stored))
        rounded = svdquant_linear(x, layer, stored, compute="w4a4")
    weight, bias = comfy.ops.cast_bias_weight(module, x)
    return linear(x, weight, bias) + (rounded - exact)


def test_every_gradient_of_w4a4_is_that_of_plain_torch_straight_through(checkpoint, source, monkeypatch):
    gradients: list[list[torch.Tensor | None]] = []

    class Recorded(torch.optim.SGD):
        def step(self, *args):
            parameters = self.param_groups[0]["params"]
            gradients.append([None if each.grad is None else each.grad.clone() for each in parameters])
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    with torch.inference_mode():
        plain = straight_through_model(checkpoint, source)
    for model in (plain, four_bit_model(checkpoint, "w4a4")):
        train(model, optimizer="SGD", learning_rate=0.1, steps=2)
    assert len(gradients) == 4
    for wanted, found in zip(gradients[:2], gradients[2:], strict=True):
        assert len(wanted) == len(found)
        for plain, mine in zip(wanted, found, strict=True):
            assert (plain is None) == (mine is None)
            if plain is not None:
                assert torch.dist(mine, plain) <= 1e-3 * plain.norm()
    assert sum(bool(each is not None and each.any()) for each in gradients[3]) > 100


# -- what the node offers, on one format


@pytest.fixture(scope="module")
def int4(source):
    path = source.with_name("small.safetensors")
    quantize_model(FileSource(source), path, Recipe(format="int4", rank=16, alternations=1))
    return path


@pytest.fixture(scope="module")
def plain(int4):
    """What the node trains with no switch set."""
    return train(four_bit_model(int4), steps=2)[0]


@pytest.mark.parametrize("algorithm", ["LoHa", "LoKr", "OFT"])
def test_other_algorithms_train_what_they_train_on_the_dense_model(algorithm, int4, source):
    wanted, *_ = train(dense_model(int4, source), algorithm=algorithm)
    assert_same(train(four_bit_model(int4), algorithm=algorithm)[0], wanted)


def test_the_two_thin_products_of_a_lora_are_its_function_of_the_weight(int4, plain, monkeypatch):
    monkeypatch.setattr(training, "LORA", None)
    assert_same(train(four_bit_model(int4), steps=2)[0], plain, 1e-4)


SWITCHES = [
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "checkpoint_depth": 4},
    {"gradient_checkpointing": True, "checkpoint_depth": 4, "offloading": True},
    {"quantized_backward": True},
    {"bypass_mode": True},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_a_switch_of_the_node_changes_how_it_trains_and_not_what(switches, int4, plain):
    if missing := switches.keys() - KNOWN:
        pytest.skip(f"TrainLora of this ComfyUI has no {', '.join(missing)}")
    assert_same(train(four_bit_model(int4), steps=2, **switches)[0], plain)


def test_weights_that_come_through_one_buffer_are_kept_for_the_backward_pass(int4, plain, monkeypatch):
    """Hosts stream offloaded weights so, and each view of the buffer is a tensor that knows nothing of the others."""
    patcher, cast = four_bit_model(int4), comfy.ops.cast_bias_weight
    buffer = numpy.zeros(max(layer.blob.numel() for layer in patcher.packed_layers().values()), numpy.uint8)

    def streamed(layer, *args, **kwargs):
        blob, *rest = cast(layer, *args, **kwargs)
        if getattr(layer, "packed", None) is None:
            return blob, *rest
        return torch.from_numpy(buffer[: blob.numel()]).copy_(blob), *rest

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", streamed)
    assert_same(train(patcher, steps=2)[0], plain)


@pytest.mark.parametrize("settings", [{"training_dtype": "bf16"}, {"training_dtype": "none"}], ids=str)
def test_training_in_16_bit(settings, int4, source):
    """With LoRAs of 16 bit. Layers see 16-bit activations, also where the node's autocast has left float32."""
    if settings["training_dtype"] == "none" and "bypass_mode" not in KNOWN:
        pytest.skip("TrainLora of this ComfyUI has its own dtype always")
    patcher = four_bit_model(int4)
    _, wanted, *_ = train(dense_model(int4, source), lora_dtype="bf16", gradient_checkpointing=True, **settings)
    lora, losses, *_ = train(patcher, lora_dtype="bf16", gradient_checkpointing=True, **settings)
    assert losses == pytest.approx(wanted, rel=0.05)
    assert {tensor.dtype for tensor in lora.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in lora.values())


def test_a_layer_under_autocast_computes_in_its_dtype(int4):
    patcher = four_bit_model(int4)
    key, layer = next(iter(patcher.packed_layers().items()))
    patcher.add_weight_wrapper(key, lambda weight: weight + 1)
    comfy.model_management.load_models_gpu([patcher])
    x = torch.randn(2, layer.in_features, device=patcher.load_device)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


def test_training_goes_on_from_a_lora(int4, source, plain, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    name = "trained_2_steps_00001_.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in plain.items()}, tmp_path / name)
    wanted, *_ = train(dense_model(int4, source), steps=2, existing_lora=name)
    found, *_ = train(four_bit_model(int4), steps=2, existing_lora=name)
    assert_same(found, wanted)
    moved = [key for key, tensor in found.items() if not torch.equal(tensor, plain[key])]
    assert len(moved) > len(found) / 2


@pytest.mark.parametrize("algorithm", ["LoRA", "OFT"])
def test_it_trains_on_top_of_loras_of_every_kind(algorithm, int4, source):
    with torch.inference_mode():
        pair = four_bit_model(int4), dense_model(int4, source)
        file = lora_of(("lora", "lokr", "loha", "dora_out", "dora_in"), dense_weights(*pair))
        zoo.forward(with_file(pair[0], file, 0.3), FAMILY)  # a prompt before, which leaves its factors on the device
        models = [with_file(patcher, file, 0.7) for patcher in pair]
    found, wanted = (train(patcher, steps=2, algorithm=algorithm) for patcher in models)
    assert_same(found[0], wanted[0])


def test_training_leaves_the_model_as_it_was(int4, plain):
    patcher = four_bit_model(int4)
    before, size = zoo.forward(patcher, FAMILY), patcher.model_size()
    for _ in "12":
        assert_same(train(patcher, steps=2)[0], plain, 0)
        assert torch.equal(zoo.forward(patcher, FAMILY), before)
        assert patcher.model_size() == size
        comfy.model_management.unload_all_models()
    for layer in patcher.packed_layers().values():
        assert layer.weight.dtype == torch.uint8 and not layer.weight_function


def test_the_model_that_older_hosts_hand_back_has_the_lora(int4):
    patcher = four_bit_model(int4)
    lora, _, *trained = train(patcher)
    if not trained:
        pytest.skip("TrainLora of this ComfyUI hands no model back")
    with torch.inference_mode():
        found = zoo.forward(trained[0], FAMILY)
        assert relative(found, zoo.forward(with_file(patcher, lora, 1.0), FAMILY)) < 1e-4
        assert relative(found, zoo.forward(patcher, FAMILY)) > 1e-3
        comfy.model_management.unload_all_models()
        trained[0].patch_model(patcher.load_device, lowvram_model_memory=patcher.model_size() // 2)
        assert torch.equal(zoo.forward(trained[0], FAMILY), found), "half loaded"


def test_a_weight_shows_its_shape_until_the_next_load_and_is_its_bytes_for_everybody_else(int4):
    patcher = four_bit_model(int4)
    before = zoo.forward(patcher, FAMILY)
    saved, size = patcher.model.state_dict(), patcher.model_size()
    other = patcher.clone()
    other.set_model_compute_dtype(torch.float32)  # the node ModelComputeDtype does no more
    assert other.object_patches["manual_cast_dtype"] == torch.float32
    for layer in patcher.packed_layers().values():
        assert layer.weight.shape == (layer.out_features, layer.in_features)
        assert layer.weight.untyped_storage().nbytes() == 4 and layer.weight.device == layer.blob.device
        assert layer.blob.dtype == torch.uint8
    assert other.model_size() == size
    shown = patcher.model.state_dict()
    assert shown.keys() == saved.keys() and all(torch.equal(tensor, saved[key]) for key, tensor in shown.items())
    lora = lora_of(("dora_out",), {key: layer.weight for key, layer in other.packed_layers().items()})
    assert other.layer_loras() == {} and len(with_file(other, lora, 1.0).layer_loras()) == len(patcher.packed_layers())
    assert torch.equal(zoo.forward(patcher, FAMILY), before)
    assert all(layer.weight is layer.blob for layer in patcher.packed_layers().values())
    assert torch.equal(zoo.forward(other, FAMILY), before)
    unloaded = (  # the host makes room for another model
        lambda: other.partially_unload(torch.device("cpu"), patcher.model_size()),
        lambda: other.unpatch_model(torch.device("cpu")),
    )
    for unload in unloaded:
        other.set_model_compute_dtype(torch.float32)
        unload()
        assert all(layer.weight is layer.blob for layer in patcher.packed_layers().values())
    assert torch.equal(zoo.forward(other, FAMILY), before)


def test_a_host_that_would_train_the_bytes_is_refused(int4):
    patcher = four_bit_model(int4)
    key, layer = next(iter(patcher.packed_layers().items()))
    with pytest.raises(LoraError, match=r"4-bit layer .* vector of bytes"):
        patcher.add_weight_wrapper(key, nodes_train.BiasDiff(torch.zeros(layer.blob.shape)))
    assert not patcher.weight_wrapper_patches
