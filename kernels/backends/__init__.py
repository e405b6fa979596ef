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
from ..stages import activate, weighted

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
    measured    whether who runs it is decided by what was measured on this machine, and not by a table
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
    measured: bool = False

    @property
    def fmt(self) -> Format:
        return FORMATS[self.format]


@dataclass(frozen=True)
class Backend:
    """A set of kernels.

    name      as shown to the user
    claims    KernelCall -> how much it wants the call, the highest claim runs it; or a sentence: why it cannot
    prepare   (x, layer, bias, lora, compute, activation) -> Run for all calls like this one: as many rows, up to a
              power of two, and tensors of the same shapes, types and device. It may keep none of them. x is (M, K),
              `compute` resolved, `activation` that of svdquant_linear. `each_call` makes one of a function
    order     (spec, compute) -> the order, beside the natural one, in which such a layer is read as it is; or ""
    compiled  () -> kernels that it has compiled in this process so far
    """

    name: str
    claims: Callable[[KernelCall], int | str]
    prepare: Callable[..., Run]
    order: Callable[[LayerSpec, str], str] = lambda spec, compute: ""
    compiled: Callable[[], int] = int

    def linear(
        self,
        x: torch.Tensor,
        layer: Layer,
        bias: torch.Tensor | None,
        lora: Lora | None,
        compute: str,
        activation: str = "",
    ) -> torch.Tensor:
        """One whole layer on x (M, K), prepared for this call alone"""
        return self.prepare(x, layer, bias, lora, compute, activation)(x, layer, bias, lora)


def each_call(linear: Callable[..., torch.Tensor], epilogue: bool = False) -> Callable[..., Run]:
    """`prepare` of a backend that is the function linear(x, layer, bias, lora, compute) -> y

    epilogue  whether it takes strengths inside `lora`, and `activation` as sixth argument; else it gets both here
    """

    def prepare(
        x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, compute: str, activation: str
    ) -> Run:
        if epilogue:
            return lambda x, layer, bias, lora: linear(x, layer, bias, lora, compute, activation)
        return with_epilogue(lambda x, layer, bias, lora: linear(x, layer, bias, lora, compute), activation)

    return prepare


def with_epilogue(run: Run, activation: str) -> Run:
    """activation(run), on a LoRA with strengths, of which `run` knows nothing: they go onto the factor"""

    def whole(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        plain = None if lora is None else Lora(weighted(lora.down, lora.strength), lora.up)
        return activate(run(x, layer, bias, plain), activation)

    return whole


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
