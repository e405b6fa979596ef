"""Bridge: what a loaded 4-bit MODEL is and what runs its layers, as plain data."""

from collections.abc import Iterable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...kernels.dispatch import Choice, arch_of, faster_format
from ...kernels.first_use import FirstUse
from ...kernels.layer import LayerSpec
from ...kernels.measured import facts, known
from ...kernels.modes import MEASURED
from .patcher import SVDQuantPatcher, layer_name

ATTACHMENT = "svdquant"  # where a patcher keeps `describe` of its file
FASTER = "runs, but a file of this model in {} would be faster: this GPU computes those in 4 bit"


def describe_model(patcher: ModelPatcher) -> dict[str, Any] | None:
    """`describe` of the checkpoint behind a MODEL, with the backend of every layer; None for a 16-bit MODEL."""
    if not isinstance(patcher, SVDQuantPatcher):
        return None
    file = dict(patcher.attachments[ATTACHMENT])
    dtype = dtype_of(patcher)
    device, loras, backends = patcher.load_device, patcher.layer_loras(), {}
    for key, module in patcher.packed_layers().items():
        choice = module.four_bit.choice(device, dtype)
        backends[layer_name(key)] = {
            "backend": choice.backend.name,
            "compute": choice.compute,
            "asked": module.four_bit.compute,
            "passed_over": choice.passed_over,
            "decided": decided(module.four_bit.spec, choice),
            "lora_rank": loras[key].rank if key in loras else 0,
        }
    faster = faster_format_of(file["formats"], device)
    first_use = patcher.model.svdquant.first_use or FirstUse(device, "auto")
    compiled = {"kernels": first_use.kernels, "seconds": round(first_use.seconds, 1), "running": first_use.running}
    asked = any(layer["asked"] == MEASURED for layer in backends.values())
    found, unused = known(device) if asked else ({}, "")
    here = {"device": str(device), "dtype": str(dtype), "faster": faster, "first_use": compiled}
    versions = [f"{name} {version}" for name, version in facts(device).items() if name != "pack"]
    measured = {"measured_with": ", ".join(versions) if found else "", "not_measured": unused}
    return file | here | measured | {"backends": backends}


def dtype_of(patcher: ModelPatcher) -> torch.dtype:
    """What the model computes in"""
    dtype: torch.dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    return dtype


def decided(spec: LayerSpec, choice: Choice) -> str:
    """What runs layers of a kind, and what decided it: the tables, or what was measured here."""
    kind = spec.format + ", partly unsigned" * spec.partly_unsigned + ", 8-bit activations" * (spec.act_bits == 8)
    runs = f"{choice.backend.name} {choice.compute}"
    if choice.measured is None:
        return f"{kind}: {runs}, by the tables"
    chosen, tabled = choice.measured.chosen, choice.measured.tabled
    gain = "as in the tables" if chosen == tabled else f"{chosen.seconds / tabled.seconds:.2f} of {tabled.name}'s time"
    return f"{kind}, {spec.n} x {spec.k}: {runs}, {gain}, measured on {choice.measured.date}"


def faster_format_of(formats: Iterable[str], device: torch.device) -> str | None:
    """The format whose files this device would run faster than one of these, or None."""
    arch, _ = arch_of(device)
    return next((faster for format in formats if (faster := faster_format(format, arch))), None)
