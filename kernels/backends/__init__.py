"""Kernel backends: what lies in this folder. One that cannot be imported leaves its reason.

A new backend is one new file (or folder) that defines `BACKEND`; a module without one is no backend.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ..formats import FORMATS, Format
from ..layer import Layer, LayerSpec, Lora

Run = Callable[[torch.Tensor, Layer, torch.Tensor | None, Lora | None], torch.Tensor]
"""(x, layer, bias, lora) -> y, the rest of a call is known already"""


@dataclass(frozen=True)
class KernelCall:
    """What a backend needs to know to say whether it can run a layer.

    capability  of an NVIDIA GPU, else None
    arch        sm_90, gfx942, ..., or the type of a device that is neither NVIDIA's nor AMD's
    rows        M of the activation
    partly_unsigned  whether some, but not all, input channels have unsigned codes
    asked       whether the user named this mode, and it is not one that `auto` tries
    """

    format: str
    device: torch.device
    dtype: torch.dtype
    compute: str
    capability: tuple[int, int] | None = None
    arch: str = ""
    rows: int = 4096
    partly_unsigned: bool = False
    asked: bool = True

    @property
    def fmt(self) -> Format:
        return FORMATS[self.format]


@dataclass(frozen=True)
class Backend:
    """A set of kernels.

    name      as shown to the user
    claims    KernelCall -> how much it wants the call, the highest claim runs it; or a sentence: why it cannot
    linear    (x, layer, bias, lora, compute) -> y: the whole layer, x (M, K), `lora` a Lora or None, `compute` resolved
    epilogue  whether `linear` takes strengths inside `lora`, and as sixth argument the `activation` of svdquant_linear
    prepare   the arguments of `linear` -> Run for all calls like this one: as many rows, up to a power of two, and
              tensors of the same shapes, types and device. It may keep none of them
    order     (spec, compute) -> the order, beside the natural one, in which `linear` reads such a layer as it is; or ""
    """

    name: str
    claims: Callable[[KernelCall], int | str]
    linear: Callable[..., torch.Tensor]
    epilogue: bool = False
    prepare: Callable[..., Run] | None = None
    order: Callable[[LayerSpec, str], str] = lambda spec, compute: ""


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
