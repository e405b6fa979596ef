"""Bridge: what a loaded 4-bit MODEL is and what runs its layers, as plain data."""

from collections.abc import Iterable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...kernels.dispatch import arch_of, faster_format
from .patcher import SVDQuantPatcher, layer_name

ATTACHMENT = "svdquant"  # where a patcher keeps `describe` of its file
FASTER = "runs, but a file of this model in {} would be faster: this GPU computes those in 4 bit"


def describe_model(patcher: ModelPatcher) -> dict[str, Any] | None:
    """`describe` of the checkpoint behind a MODEL, with the backend of every layer; None for a 16-bit MODEL."""
    if not isinstance(patcher, SVDQuantPatcher):
        return None
    file = dict(patcher.attachments[ATTACHMENT])
    dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    device, loras, backends = patcher.load_device, patcher.layer_loras(), {}
    for key, module in patcher.packed_layers().items():
        choice = module.four_bit.choice(device, dtype)
        backends[layer_name(key)] = {
            "backend": choice.backend.name,
            "compute": choice.compute,
            "asked": module.four_bit.compute,
            "passed_over": choice.passed_over,
            "lora_rank": loras[key].rank if key in loras else 0,
        }
    faster = faster_format_of(file["formats"], device)
    return file | {"device": str(device), "dtype": str(dtype), "faster": faster, "backends": backends}


def faster_format_of(formats: Iterable[str], device: torch.device) -> str | None:
    """The format whose files this device would run faster than one of these, or None."""
    arch, _ = arch_of(device)
    return next((faster for format in formats if (faster := faster_format(format, arch))), None)
