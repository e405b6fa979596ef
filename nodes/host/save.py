"""Bridge: what ComfyUI's save nodes write of a 4-bit MODEL.

All of them, on every host, take `diffusion_model.state_dict()`, without a prefix; nothing else asks for it so. To them
the model is what a native file holds: LoRAs a part of their layers, and one tensor more with the strings of a header,
which those nodes do not write. `quantize.files.part` reads it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...quantize.files.checkpoint import Provenance
from ...quantize.files.dialects.native import encode_layer
from ...quantize.files.header import metadata_of
from ...quantize.files.part import HEADER, header_tensor
from ...quantize.lora.bake import BakedLayer, bake_layer
from ...quantize.lora.deltas import LoraError
from ...quantize.lora.fit import LoraLimits
from .linear import SVDQuantLinear
from .lora_groups import layer_name
from .state import ModelState

REFUSED = (
    "have a LoRA, and SVDQuant LoRA Limits says that none is to become a part of a saved model. Save it without the "
    "LoRA, or set when_saved to bake"
)


def save_as_native(model: Any) -> None:
    """Have save nodes write the host's `model`, which has 4-bit layers, as a file that opens again."""
    model.diffusion_model.register_state_dict_post_hook(partial(_as_native, model.svdquant))


@contextlib.contextmanager
def said_final(layers: Mapping[str, SVDQuantLinear]) -> Iterator[Mapping[str, SVDQuantLinear]]:
    """Meanwhile all of them say that their weight is as it will be saved; those that did not say so before."""
    waiting = {key: layer for key, layer in layers.items() if not getattr(layer, "comfy_patched_weights", False)}
    for layer in waiting.values():
        layer.comfy_patched_weights = True
    try:
        yield waiting
    finally:
        for layer in waiting.values():
            layer.comfy_patched_weights = False


def provenance_of(stored: Provenance, model: Any) -> Provenance:
    """That of a file made of the host's `model` as it is now: the configuration is the model's own."""
    config: dict[str, Any] = {key: value for key, value in model.model_config.unet_config.items() if _is_json(value)}
    return replace(stored, unet_config=config, pinned=tuple(key for key in stored.pinned if key in config))


def stored_dtype(layers: Mapping[str, SVDQuantLinear]) -> torch.dtype:
    """The 16-bit dtype of the 4-bit layers."""
    views = (view for module in layers.values() for view in module.four_bit.views)
    return next((view.dtype for view in views if view.name == "smooth_factor"), torch.bfloat16)


def _as_native(
    state: ModelState, module: torch.nn.Module, tensors: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    if prefix:
        return
    layers = {layer_name(key): layer for key, layer in state.layers.items()}
    specs, dtype, baked = {name: layer.four_bit.spec for name, layer in layers.items()}, stored_dtype(layers), False
    for name, entry in _with_loras(state):
        for key in encode_layer(name, layers[name].four_bit.listed(layers[name].blob.detach())):
            del tensors[key]
        baked = True
        if entry.layer is not None:
            tensors.update(encode_layer(name, entry.layer))
            specs[name] = entry.layer.spec
        elif entry.weight is not None:  # a format without a branch: what it has become is stored as it is
            tensors[f"{name}.weight"] = entry.weight.to(dtype)
            del specs[name]
    recipe = dict(state.provenance.recipe) | ({"baked_loras": True} if baked else {})
    tensors[HEADER] = header_tensor(metadata_of(replace(state.provenance, recipe=recipe), specs))


def _with_loras(state: ModelState) -> Iterator[tuple[str, BakedLayer]]:
    """The layers that have LoRAs, those of hooks aside. Raises LoraError where they are to be refused or do not fit."""
    loras = {key: state.unhooked.get(key, layer.loras) for key, layer in state.layers.items()}
    patched = {key: found for key, found in loras.items() if found is not None}
    if patched and state.limits is None:
        first = layer_name(min(patched))
        raise LoraError(f"{len(patched)} 4-bit layers, first {first}, {REFUSED}")
    for key, found in patched.items():
        layer = state.layers[key]
        numbers = layer.four_bit.layer(layer.blob.detach().cpu())
        try:
            yield layer_name(key), bake_layer(numbers, found, None, state.limits or LoraLimits(), layer.blob.device)
        except LoraError as error:
            raise LoraError(f"{layer_name(key)}: {error}. SVDQuant Bake LoRA can lose what does not fit") from error


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
