"""Kernel backends: what lies in this folder. One that cannot be imported leaves its reason.

A new backend is one new file (or folder) that defines `BACKEND`.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Call:
    """What a backend needs to know to say whether it can run a layer."""

    format: str
    device: torch.device
    dtype: torch.dtype
    compute: str
    capability: tuple[int, int] | None = None  # of a CUDA device


@dataclass(frozen=True)
class Backend:
    """A set of kernels.

    name      as shown to the user
    priority  the highest that does not refuse is chosen
    refuses   Call -> why it cannot run, or None when it can
    linear    the whole layer, same arguments as kernels.svdquant_linear with `compute` resolved
    """

    name: str
    priority: int
    refuses: Callable[[Call], str | None]
    linear: Callable[..., torch.Tensor]


@cache
def discover() -> tuple[dict[str, Backend], dict[str, str]]:
    """(backends by name, reason by name of those that cannot be imported), on first use: importing costs nothing."""
    found, absent = {}, {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        try:
            backend = importlib.import_module(f"{__name__}.{info.name}").BACKEND
        except ImportError as error:  # an optional library: the reason is kept and shown by the model-info node
            absent[info.name] = f"not available: {error}"
        else:
            found[backend.name] = backend
    return found, absent
