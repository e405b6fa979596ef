"""Bridge: whether the host could load what is about to be made of a file, found before hours are spent on it."""

import logging
from typing import Any

import comfy.model_detection
import torch

from ...quantize.families import FAMILIES
from ...quantize.files.checkpoint import CheckpointError
from ...quantize.files.source import FileSource
from ...quantize.files.tensor_file import TensorFile
from ...quantize.maker.plan import plan_layers
from ...quantize.model_config import ConfigError, Extent, check_config
from ...quantize.recipe import Recipe

log = logging.getLogger("svdquant")


def known_to_host(file: TensorFile) -> bool:
    """Whether the host has a model of these names and shapes."""
    return comfy.model_detection.model_config_from_unet(_stand_ins(file), "") is not None


def refuse_unopenable(source: FileSource, recipe: Recipe) -> None:
    """Raise CheckpointError where the host has no model of these tensors, or one without the layers to quantize."""
    layers = plan_layers(source.infos, FAMILIES[source.family], recipe).specs
    config = _config(source)
    if config is None:
        raise CheckpointError(
            f"{source.name}: this ComfyUI has no model with these layers (family {source.family}), so what would be "
            "made of it could not be loaded: a newer ComfyUI may have one, or the file is no diffusion model"
        )
    names = _names(config, source)
    unused = [layer for layer in layers if f"{layer}.weight" not in names] if names is not None else []
    if unused:
        raise CheckpointError(
            f"{source.name}: {len(unused)} layers that would become 4-bit have no place in the model that ComfyUI "
            f"builds, first {min(unused)!r}: what would be made of the file could not be loaded"
        )


def _stand_ins(file: Any) -> dict[str, torch.Tensor]:
    return {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in file.infos.items()}


def _config(source: FileSource) -> Any:
    tensors, detection = _stand_ins(source), comfy.model_detection
    if not source.unet_config:
        return detection.model_config_from_unet(tensors, "")
    try:  # before anything is built of it
        shapes = [info.shape for info in source.infos.values()]
        check_config(source.unet_config, Extent(source.infos, shapes), FAMILIES[source.family].config)
    except ConfigError as error:
        raise CheckpointError(f"{source.name}: {error}") from error
    config = {**(detection.detect_unet_config(tensors, "") or {}), **source.unet_config}
    return detection.model_config_from_unet_config(config, tensors)


def _names(config: Any, source: FileSource) -> set[str] | None:
    """Names of the model's tensors, from a model without memory; None where its constructor needs some."""
    try:
        config.set_inference_dtype(torch.bfloat16, None)
        model = config.get_model(_stand_ins(source), "", device=torch.device("meta"))
        return set(model.diffusion_model.state_dict())
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        log.debug("%s: its names are not known before it is loaded (%s)", source.name, error)
        return None
