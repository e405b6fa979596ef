"""Kernel backends: what lies in this folder. One that cannot be imported leaves its reason.

A new backend is one new file (or folder) that defines `BACKEND`; a module without one is no backend.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to say whether it can run a layer.

    capability  of an NVIDIA GPU, else None
    arch        sm_90, gfx942, ..., or the type of a device that is neither NVIDIA's nor AMD's
    rows        M of the activation
    partly_unsigned  whether some, but not all, input channels have unsigned codes
    """

    format: str
    device: torch.device
    dtype: torch.dtype
    compute: str
    capability: tuple[int, int] | None = None
    arch: str = ""
    rows: int = 4096
    partly_unsigned: bool = False


@dataclass(frozen=True)
class Backend:
    """A set of kernels.

    name      as shown to the user
    priority  the highest that does not refuse is chosen
    refuses   Call -> why it cannot run, or None when it can
    linear    (x, layer, bias, lora, compute) -> y: the whole layer, x (M, K) and `compute` resolved
    epilogue  whether `linear` also takes the keywords lora_strength and activation of kernels.svdquant_linear
    stages    single steps of a layer by the name of the public operation, see kernels/stages.py; may be empty
    """

    name: str
    priority: int
    refuses: Callable[[Call], str | None]
    linear: Callable[..., torch.Tensor]
    epilogue: bool = False
    stages: Mapping[str, Callable] = field(default_factory=dict)


@cache
def discover() -> tuple[dict[str, Backend], dict[str, str]]:
    """(backends by name, reason by name of those that cannot be imported), on first use: importing costs nothing."""
    found, absent = {}, {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        try:
            backend = vars(importlib.import_module(f"{__name__}.{info.name}")).get("BACKEND")
        except ImportError as error:  # an optional library: the reason is kept and shown by the model-info node
            absent[info.name] = f"not available: {error}"
        else:
            if backend is not None:
                found[backend.name] = backend
    return found, absent
