"""Tiny models with random weights, built from ComfyUI's own classes: at least one of every family, and how to call it.

A model is saved as a 16-bit file whose metadata holds its configuration, so that the pack's loader builds it again
through ComfyUI's own loading code.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from svdquant_pack.tests.nodes.zoo_models import TOKENS, ZOO

PARAMETERS = {  # models whose constructor takes exactly the fields of a dataclass
    "flux": ("comfy.ldm.flux.model", "FluxParams"),
    "flux2": ("comfy.ldm.flux.model", "FluxParams"),
    "chroma": ("comfy.ldm.chroma.model", "ChromaParams"),
    "hunyuan_video": ("comfy.ldm.hunyuan_video.model", "HunyuanVideoParams"),
}
LATER = {"txt_ids_dims": [], "vec_in_dim": None, "meanflow_sum": False}  # fields since 0.4


def missing(name: str) -> str | None:
    """Why this ComfyUI cannot build a model of the zoo, or None."""
    import comfy.supported_models

    if name == "kandinsky5" and not hasattr(comfy.supported_models, "Kandinsky5"):
        return "this ComfyUI has no Kandinsky 5"
    return None


def config_of(name: str) -> dict[str, Any]:
    """The unet_config of one entry as a file would hold it, with what a newer ComfyUI wants in addition."""
    config = json.loads(json.dumps(dict(ZOO[name].config)))
    if config.get("image_model") in PARAMETERS:
        module, params = PARAMETERS[config["image_model"]]
        known = {entry.name for entry in fields(getattr(importlib.import_module(module), params))}
        config |= {key: value for key, value in LATER.items() if key in known and key not in config}
    return config


def build(name: str) -> torch.nn.Module:
    """ComfyUI's own model of one entry, with random weights."""
    import comfy.model_detection

    config = config_of(name)
    settings = comfy.model_detection.model_config_from_unet_config(config)
    assert settings is not None, f"{name}: no class of this ComfyUI matches"
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, "").diffusion_model
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and not key.endswith("bias"):
            values = 1 + 0.1 * values  # of a norm
        elif parameter.ndim == 1:
            values = 0.05 * values
        else:
            values = values * (0.8 / max(1, parameter[0].numel()) ** 0.5)
        parameter.data = values
    for key, buffer in model.named_buffers():
        if key == "pos_embed":  # SD3 leaves it uninitialized
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def save(name: str, path: Path) -> Path:
    """Write one entry as the 16-bit file that a person would have."""
    tensors = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in build(name).state_dict().items()}
    save_file(tensors, path, metadata={"config": json.dumps(config_of(name))})
    return path


def dense(name: str, source: Path, checkpoint: Any) -> Any:
    """The 16-bit model in `source` as a MODEL that holds the decoded weights of its 4-bit `checkpoint`."""
    import comfy.utils

    from svdquant_pack.nodes.host.model import load_pinned_model

    patcher = load_pinned_model(str(source))
    for key in checkpoint.specs:
        layer, module = checkpoint.layer(key), comfy.utils.get_attr(patcher.model.diffusion_model, key)
        module.weight.data = layer.dense_weight()
        if module.bias is not None:
            module.bias.data = layer.unshifted_bias(checkpoint.tensor(f"{key}.bias")).float()
        else:
            assert checkpoint.specs[key].act_unsigned == (0, 0), "the shift needs a bias in ComfyUI's layer"
    return patcher


def forward(patcher: Any, name: str) -> torch.Tensor:
    """One call of the model through ComfyUI's own loading and apply_model."""
    model, latent = _model(patcher, name)
    return model(latent, torch.full((1,), 0.7, device=latent.device)).cpu()


def forward_wrapped(patcher: Any, name: str, **extra: Any) -> torch.Tensor:
    """The same with the patcher's wrappers around it, which a sampler hands over, and more arguments."""
    model, latent = _model(patcher, name, {"wrappers": patcher.wrappers}, extra)
    return model(latent, torch.full((1,), 0.7, device=latent.device)).cpu()


def sample(patcher: Any, name: str, steps: int = 2) -> torch.Tensor:
    """A latent from noise by ComfyUI's own Euler sampler."""
    from comfy.k_diffusion.sampling import sample_euler

    model, latent = _model(patcher, name)
    return sample_euler(model, latent, torch.linspace(1, 0, steps + 1, device=latent.device), disable=True).cpu()


def _model(
    patcher: Any, name: str, options: Any = None, more: Any = None
) -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], torch.Tensor]:
    """((latent, sigma) -> denoised latent, a latent)"""
    import comfy.model_management

    tiny, generator = ZOO[name], torch.Generator().manual_seed(1)
    comfy.model_management.load_models_gpu([patcher])
    device = patcher.load_device

    def value(entry: Any) -> Any:
        if isinstance(entry, tuple) and entry and entry[0] == "value":
            return entry[1]
        return torch.randn(entry, generator=generator).to(device)

    latent, text = value(tiny.latent), value((1, TOKENS, tiny.text))
    extra = {key: value(entry) for key, entry in tiny.extra.items()} | (more or {})

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return patcher.model.apply_model(
                x, sigma, c_crossattn=text, transformer_options=dict(options or {}), **extra
            )

    return model, latent


def skeleton(model: torch.nn.Module) -> dict[str, dict[str, list[Any]]]:
    """Names and shapes of a model: {"linear" or "other": {name with # for numbers: [[shape, ["0.1", ..]], ..]}}"""
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found: dict[str, dict[str, dict[str, list[str]]]] = {"linear": {}, "other": {}}
    for key, tensor in model.state_dict().items():
        places, name = fold(key)
        shapes = found["linear" if key in linears else "other"].setdefault(name, {})
        shapes.setdefault(json.dumps(list(tensor.shape)), []).append(places)
    return {
        kind: {name: [[json.loads(shape), at] for shape, at in shapes.items()] for name, shapes in names.items()}
        for kind, names in found.items()
    }


def fold(key: str) -> tuple[str, str]:
    """blocks.3.mlp.0.weight -> ("3.0", "blocks.#.mlp.#.weight")"""
    parts = key.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return ".".join(numbers), ".".join("#" if part.isdigit() else part for part in parts)
