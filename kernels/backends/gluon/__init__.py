"""Kernels in which register layouts and asynchronous steps are written out, for what the compiler cannot do by itself.

    w4a4      int4_mma    INT4 tensor cores of sm_75 to sm_89
    w4a8-jit  int8_async  int8 GEMM of sm_90 that overlaps its tensor-core instructions

Nothing is imported from the compiler before the first call.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ...layer import Layer
from .. import Backend, Call, discover
from ..triton import versions

PRIORITY = 30  # above Triton's own kernels, which do the same work with more instructions
INT4_CORES = ((7, 5), (8, 9))  # first and last compute capability; from 9.0 on the instruction is a slow subroutine
TURING = (7, 5)
HOPPER = (9, 0)
STEPS_FROM = "triton"  # the backend that quantizes and expands for w4a8-jit


@cache
def missing() -> str | None:
    """Why the language is not there, or None."""
    if reason := versions.missing():
        return reason
    try:
        importlib.import_module("triton.experimental.gluon")
    except ImportError as error:
        return f"this Triton has no Gluon, 3.5 and newer have: {error}"
    return None


def refuses(call: Call) -> str | None:
    """Why these kernels cannot run this call, or None."""
    if call.compute not in ("w4a4", "w4a8-jit"):
        return f"computes w4a4 and w4a8-jit, not {call.compute}"
    if call.device.type != "cuda" or call.capability is None:
        return f"needs an NVIDIA GPU, this is {call.device}"
    reason = _refuses_w4a4(call) if call.compute == "w4a4" else _refuses_jit(call)
    return reason or missing()


def _refuses_w4a4(call: Call) -> str | None:
    if call.format != "int4":
        return f"multiplies int4 by int4, this layer is {call.format}"
    first, last = INT4_CORES
    if not first <= call.capability <= last:
        return f"INT4 tensor cores exist from compute capability 7.5 to 8.9, this GPU has {_number(call)}"
    dtypes = (torch.float16,) if call.capability == TURING else (torch.float16, torch.bfloat16)
    if call.dtype not in dtypes:
        return f"needs {' or '.join(map(str, dtypes))} on this GPU, not {call.dtype}"
    return None


def _refuses_jit(call: Call) -> str | None:
    if call.format not in ("int4", "nvfp4"):
        return f"expands int4 and nvfp4, this layer is {call.format}"
    if call.capability != HOPPER:
        return f"its asynchronous int8 is made for compute capability 9.0, this GPU has {_number(call)}"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"needs torch.float16 or torch.bfloat16, not {call.dtype}"
    backend = discover()[0].get(STEPS_FROM)
    return f"needs the {STEPS_FROM} kernels to quantize" if backend is None else backend.refuses(call)


def _number(call: Call) -> str:
    return ".".join(map(str, call.capability))


def linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: tuple[torch.Tensor, torch.Tensor] | None,
    compute: str,
) -> torch.Tensor:
    """The whole layer on x (M, K), the formula of the reference backend. Returns (M, N) in the dtype of x."""
    if compute == "w4a8-jit":
        from .int8_linear import int8_linear

        return int8_linear(x, layer, bias, lora, discover()[0][STEPS_FROM].stages)
    from .int4_linear import int4_linear

    return int4_linear(x, layer, bias, lora)


def _linear_w8a8(*arguments: Any) -> torch.Tensor:
    from .int8_linear import linear_w8a8

    return linear_w8a8(*arguments)


STAGES: dict[str, Callable] = {"linear_w8a8": _linear_w8a8}
BACKEND = Backend("gluon", PRIORITY, refuses, linear, stages=STAGES)
