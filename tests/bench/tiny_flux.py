"""The trained demo model as 22 linear units that can be replaced by 4-bit ones, and what that does to its velocities.

A single block's second linear is two units, the attention output and the GELU output: they have different number ranges
and the reference quantizer treats them apart, so both sides are compared that way.
"""

import copy
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from svdquant_pack.kernels import LayerSpec
from svdquant_pack.quantize.maths.inputs import LayerInput
from svdquant_pack.quantize.maths.layer import FittedLayer

MODELS = Path(__file__).resolve().parents[2] / "workflows" / "models"
MODEL_FILE = MODELS / "diffusion_models" / "svdquant_demo_digits.safetensors"
PROMPTS_FILE = MODELS / "svdquant_demo_prompts.safetensors"
STEPS = 20


@dataclass(frozen=True)
class Unit:
    """A linear, or a slice of its input columns; `gelu` says where the slice comes from."""

    module: str
    columns: slice
    gelu: bool

    def weight(self, model: torch.nn.Module) -> torch.Tensor:
        return model.get_submodule(self.module).weight.detach()[:, self.columns].contiguous()

    def bias(self, model: torch.nn.Module) -> torch.Tensor:
        bias = model.get_submodule(self.module).bias.detach()
        return torch.zeros_like(bias) if self.columns.start else bias  # the first slice carries it

    def spec(self, model: torch.nn.Module, format: str, rank: int, rule: str = "absmax") -> LayerSpec:
        n, k = self.weight(model).shape
        return LayerSpec(format, n, k, rank, (0, k) if self.gelu and format == "int4" else (0, 0), rule)


class Rounded(torch.nn.Module):
    """A linear whose units are 4-bit, computed in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[slice, LayerSpec, FittedLayer]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, y = x.reshape(-1, x.shape[-1]), 0
        for columns, spec, fit in self.parts:
            part = rows[:, columns]
            inputs = LayerInput(part, fit.smooth, spec, fit.centre)
            zq = inputs.rounded(inputs.whole())
            y = y + zq @ fit.rounded.T + (part @ fit.proj_down) @ fit.proj_up.T + fit.bias
        return y.view(*x.shape[:-1], -1)


class TinyFlux:
    """The host's own FLUX class with the demo's weights in float32; COMFYUI_PATH names the host."""

    def __init__(self) -> None:
        folder = os.environ.get("COMFYUI_PATH", "")
        if not (Path(folder) / "comfy").is_dir():
            raise SystemExit("set COMFYUI_PATH to a ComfyUI folder: the trained model is an instance of its FLUX class")
        sys.path.insert(0, folder)
        from comfy.cli_args import args

        args.cpu = True
        import comfy.ldm.flux.model
        import comfy.ops

        with safe_open(MODEL_FILE, "pt") as file:
            config = json.loads(file.metadata()["config"])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
        config.pop("image_model")
        with safe_open(PROMPTS_FILE, "pt") as file:
            self.context, self.pooled = file.get_tensor("context").float(), file.get_tensor("pooled").float()
        self.model = comfy.ldm.flux.model.Flux(
            **config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
        )
        self.model.load_state_dict(tensors)
        self.model.eval().requires_grad_(False)
        self.units = list(self._find_units(config["hidden_size"]))

    def _find_units(self, hidden: int):
        for name, module in self.model.named_modules():
            parts = name.split(".")
            if not isinstance(module, torch.nn.Linear) or parts[0] not in ("double_blocks", "single_blocks"):
                continue
            if "mod" in parts[2] or parts[-1] == "lin":
                continue
            if parts[-1] == "linear2":
                yield Unit(name, slice(0, hidden), False)
                yield Unit(name, slice(hidden, None), True)
            else:
                yield Unit(name, slice(0, None), name.endswith("_mlp.2"))

    def velocity(self, model: torch.nn.Module, x: torch.Tensor, step: int) -> torch.Tensor:
        digits = torch.arange(len(x)) % 10
        sigma = torch.full((len(x),), 1 - step / STEPS)
        return model(x, sigma, self.context[digits], self.pooled[digits], None, transformer_options={})

    def noise(self, images: int, seed: int) -> torch.Tensor:
        return torch.randn(images, 16, 8, 8, generator=torch.Generator().manual_seed(seed))

    def sample(self, model: torch.nn.Module, images: int, seed: int) -> torch.Tensor:
        """Latents by Euler steps; digits take turns."""
        x = self.noise(images, seed)
        for step in range(STEPS):
            x = x - self.velocity(model, x, step) / STEPS
        return x

    def velocity_error(self, model: torch.nn.Module, images: int, seed: int) -> float:
        """||f(x_t) - v_t|| / ||v_t|| over all steps of the exact model's own trajectory"""
        x, wrong, right = self.noise(images, seed), 0.0, 0.0
        for step in range(STEPS):
            exact = self.velocity(self.model, x, step)
            wrong += (self.velocity(model, x, step) - exact).square().sum().item()
            right += exact.square().sum().item()
            x = x - exact / STEPS
        return math.sqrt(wrong / right)

    def inputs(self, images: int, seed: int) -> dict[str, torch.Tensor]:
        """module -> every row that it receives while these images are sampled."""
        seen: dict[str, list[torch.Tensor]] = {unit.module: [] for unit in self.units}
        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, rows=rows: rows.append(args[0].reshape(-1, args[0].shape[-1]).clone())
            )
            for name, rows in seen.items()
        ]
        self.sample(self.model, images, seed)
        for handle in handles:
            handle.remove()
        return {name: torch.cat(rows) for name, rows in seen.items()}

    def with_fits(self, fits: Mapping[int, tuple[LayerSpec, FittedLayer]]) -> torch.nn.Module:
        """A copy whose units are replaced; fits by place in `units`."""
        changed, modules = copy.deepcopy(self.model), {}
        for place, (spec, fit) in fits.items():
            unit = self.units[place]
            modules.setdefault(unit.module, Rounded()).parts.append((unit.columns, spec, fit))
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            setattr(changed.get_submodule(parent), leaf, module)
        return changed


def sample_psnr(latents: torch.Tensor, exact: torch.Tensor) -> float:
    """dB of the mean squared error over all images, values cut to -1..1, peak to peak 2."""
    error = (latents.clamp(-1, 1) - exact.clamp(-1, 1)).square().mean().item()
    return 10 * math.log10(4 / error)
