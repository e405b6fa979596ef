"""LoRAs trained on 4-bit layers of ComfyUI's own model, and beside them on the dense model of the decoded weights.

ComfyUI's node TrainLora is run on a 16-bit model for control. It passes for the families of CONTROL; not for those
whose blocks add to an activation in place, FLUX among them: torch refuses the backward of ComfyUI's own code. The node
takes from a weight's shape what it trains, so it is refused for a 4-bit model, and its steps are done here: the loss of
the denoised latent of ComfyUI's own model, and AdamW.
"""

import inspect

import pytest
import torch

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.model_management
import comfy.utils
from comfy_extras import nodes_train

from svdquant_pack.kernels.layer import RANK_TILE
from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.nodes.host.patcher import layer_name
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.lora.deltas import Columns, LoraError
from svdquant_pack.quantize.lora.loras import LayerLoras
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.lora_files import as_file, with_file
from svdquant_pack.tests.nodes.sampling import relative
from svdquant_pack.tests.nodes.zoo_models import TOKENS, ZOO

CONTROL = ("qwen_image", "wan_t2v", "z_image", "sd3", "lumina2", "auraflow")
FAMILY = "auraflow"  # it has no rotary embedding, see `NO_BACKWARD`
NO_BACKWARD = "through comfy_kitchen.apply_rope"  # ComfyUI 0.8 has that from comfy-kitchen
STEPS, RATE, SCALE = 50, 1e-3, 0.5


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return zoo.save(FAMILY, tmp_path_factory.mktemp("training") / "source.safetensors")


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def checkpoint(request, source):
    path = source.with_name(f"{request.param}.safetensors")
    quantize_model(FileSource(source), path, Recipe(format=request.param, rank=16, alternations=1))
    return path


def train_by_node(patcher, name: str, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What ComfyUI's node does with two latents: the LoRA and the losses."""
    tiny, generator = ZOO[name], torch.Generator().manual_seed(0)
    latents = [{"samples": torch.randn(tiny.latent, generator=generator)} for _ in "12"]
    extra = {"pooled_output": torch.randn(tiny.extra["y"], generator=generator)} if "y" in tiny.extra else {}
    positive = [[torch.randn(1, TOKENS, tiny.text, generator=generator), extra] for _ in "12"]
    settings = {"batch_size": 1, "steps": steps, "grad_accumulation_steps": 1, "learning_rate": RATE, "rank": 4}
    settings |= {"optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "algorithm": "LoRA"}
    settings |= {"lora_dtype": "fp32", "gradient_checkpointing": False, "existing_lora": "[None]"}
    newer = {"quantized_backward": False, "checkpoint_depth": 1, "offloading": False, "bucket_mode": False}
    settings |= {
        key: value
        for key, value in {**newer, "bypass_mode": False}.items()
        if key in inspect.signature(nodes_train.TrainLoraNode.execute).parameters
    }
    lists = {key: [value] for key, value in settings.items()}
    torch.manual_seed(0)
    output = nodes_train.TrainLoraNode.execute(model=[patcher], latents=latents, positive=[positive], **lists)
    lora, losses = output.args[-3:-1]
    return lora, losses["loss"]


@pytest.mark.parametrize("name", CONTROL)
def test_the_hosts_node_trains_the_16_bit_model(name, tmp_path):
    try:
        lora, losses = train_by_node(load_pinned_model(str(zoo.save(name, tmp_path / "m.safetensors"))), name, 4)
    except RuntimeError as error:
        if NO_BACKWARD not in str(error):
            raise
        pytest.skip(f"this ComfyUI trains no {name} in 16 bit: {error}")
    downs = [tensor for key, tensor in lora.items() if key.endswith("lora_down.weight")]
    assert len(losses) == 4 and any(tensor.abs().max() > 0 for tensor in downs), "they start at zero"


def test_the_hosts_node_refuses_a_4_bit_model_instead_of_training_its_bytes(checkpoint):
    with pytest.raises(LoraError, match=r"TrainLora .* 4-bit layer"):
        train_by_node(load_model(str(checkpoint)), FAMILY, 1)


class Factors(torch.nn.Module):
    """ComfyUI's form of a trained LoRA for a dense layer: a function of its weight."""

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self.columns = columns

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + SCALE * (self.columns.up @ self.columns.down.T).to(weight)

    def passive_memory_usage(self) -> int:
        return 0


def start(names) -> dict[str, Columns]:
    """Factors of every layer before the first step: up is zero, as it is usual."""
    generator, factors = torch.Generator().manual_seed(3), {}
    for name, (n, k) in names.items():
        down = torch.randn(k, RANK_TILE, generator=generator) / k**0.5
        factors[name] = Columns(down.requires_grad_(), torch.zeros(n, RANK_TILE, requires_grad=True))
    return factors


def train(patcher, factors: dict[str, Columns]) -> list[float]:
    """STEPS steps on two latents; the losses. A 4-bit layer multiplies by the factors itself."""
    tiny, generator = ZOO[FAMILY], torch.Generator().manual_seed(5)
    model = patcher.clone()
    four_bit = model.packed_layers() if hasattr(model, "packed_layers") else {}
    if not four_bit:
        for name, columns in factors.items():
            model.add_weight_wrapper(f"diffusion_model.{name}.weight", Factors(columns))
    model.model.requires_grad_(False)
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    for key, module in four_bit.items():
        module.set_loras(LayerLoras((factors[layer_name(key)],), (SCALE,)))
    latents, noises = torch.randn(2, 2, *tiny.latent, generator=generator)
    sigmas = torch.tensor([[0.4], [0.8]])
    texts = torch.randn(2, 1, TOKENS, tiny.text, generator=generator)
    optimizer = torch.optim.AdamW([leaf for each in factors.values() for leaf in (each.down, each.up)], lr=RATE)
    losses = []
    for step in range(STEPS):
        place = step % 2
        noisy = model.model.model_sampling.noise_scaling(sigmas[place], noises[place], latents[place])
        denoised = model.model.apply_model(noisy, sigmas[place], c_crossattn=texts[place], transformer_options={})
        loss = torch.nn.functional.mse_loss(denoised, latents[place])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for module in four_bit.values():
        module.set_loras(None)
    comfy.model_management.unload_all_models()
    return losses


@pytest.fixture(scope="module")
def dense(checkpoint, source):
    """The dense model of the decoded weights, the factors trained on it, and the losses."""
    opened = open_checkpoint(checkpoint)
    patcher = zoo.dense(FAMILY, source, opened)
    factors = start({name: (spec.n, spec.k) for name, spec in opened.specs.items()})
    return patcher, factors, train(patcher, factors)


def saved(factors: dict[str, Columns], path) -> dict[str, torch.Tensor]:
    file = {}
    for name, columns in factors.items():
        file[f"diffusion_model.{name}.lora_up.weight"] = columns.up.detach()
        file[f"diffusion_model.{name}.lora_down.weight"] = columns.down.detach().T
        file[f"diffusion_model.{name}.alpha"] = torch.tensor(SCALE * RANK_TILE)
    return as_file(file, path)


def test_w16_trains_the_factors_of_the_dense_model(checkpoint, dense, tmp_path):
    other, wanted, losses_of_dense = dense
    patcher = load_model(str(checkpoint), compute="w16")
    factors = start({name: tuple(each.up.shape[:1] + each.down.shape[:1]) for name, each in wanted.items()})
    losses = train(patcher, factors)
    for name, columns in factors.items():
        for mine, others in ((columns.down, wanted[name].down), (columns.up, wanted[name].up)):
            assert torch.dist(mine, others) <= 1e-3 * others.norm(), name  # some stay zero: nothing reads their layer
    assert sum(columns.up.abs().max() > 1e-3 for columns in factors.values()) > len(factors) / 2, "trained"
    assert losses[-1] == pytest.approx(losses_of_dense[-1], rel=1e-3)
    lora = saved(factors, tmp_path / "trained.safetensors")
    four_bit, plain = with_file(patcher, lora, 1.0), with_file(other, lora, 1.0)
    found = zoo.forward(four_bit, FAMILY)
    assert relative(found, zoo.forward(plain, FAMILY)) < 1e-4
    assert relative(found, zoo.forward(patcher, FAMILY)) > 0.01, "the file does something"


def test_w4a4_learns_what_the_16_bit_model_learns(checkpoint, dense, tmp_path):
    other, trained, losses_of_dense = dense
    patcher = load_model(str(checkpoint), compute="w4a4")
    factors = start({name: tuple(each.up.shape[:1] + each.down.shape[:1]) for name, each in trained.items()})
    losses = train(patcher, factors)
    assert sum(losses[-2:]) == pytest.approx(sum(losses_of_dense[-2:]), rel=0.1)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    lora = saved(factors, tmp_path / "trained.safetensors")
    for model in (patcher, other):
        assert relative(zoo.forward(with_file(model, lora, 1.0), FAMILY), zoo.forward(model, FAMILY)) > 0.01
