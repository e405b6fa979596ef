"""Kernels in which register layouts and asynchronous steps are written out, for what the compiler cannot do by itself.

    w4a4      int4_mma    INT4 tensor cores of sm_75 to sm_89
    w4a8-jit  int8_async  int8 GEMM of sm_90 that overlaps its tensor-core instructions

Nothing is imported from the compiler before the first call.
"""

import importlib
from functools import cache

import torch

from ...formats import GROUP_SIZE, TWOS_COMPLEMENT
from ...layer import Layer, LayerSpec, Lora
from .. import Backend, KernelCall, Run, triton
from ..triton import versions

CLAIM = 30  # above Triton's own kernels, which do the same work with more instructions
INT4_CORES = ((7, 5), (8, 9))  # first and last compute capability; from 9.0 on the instruction is a slow subroutine
TURING = (7, 5)
HOPPER = (9, 0)


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


def claims(call: KernelCall) -> int | str:
    """How much these kernels want a call, or why they cannot run it."""
    if call.compute not in ("w4a4", "w4a8-jit"):
        return f"computes w4a4 and w4a8-jit, not {call.compute}"
    if call.device.type != "cuda" or call.capability is None:
        return f"needs an NVIDIA GPU, this is {call.device}"
    reason = _lacks_w4a4(call) if call.compute == "w4a4" else _lacks_jit(call)
    return reason or missing() or CLAIM


def _lacks_w4a4(call: KernelCall) -> str | None:
    fmt, capability = call.fmt, call.capability or (0, 0)
    if (fmt.code, fmt.group_size) != (TWOS_COMPLEMENT, GROUP_SIZE):
        return f"multiplies int4 by int4, this layer is {call.format}"
    first, last = INT4_CORES
    if not first <= capability <= last:
        return f"INT4 tensor cores exist from compute capability 7.5 to 8.9, this GPU has {_number(call)}"
    dtypes = (torch.float16,) if capability == TURING else (torch.float16, torch.bfloat16)
    if call.dtype not in dtypes:
        return f"needs {' or '.join(map(str, dtypes))} on this GPU, not {call.dtype}"
    return None


def _lacks_jit(call: KernelCall) -> str | None:
    if torch.int8 not in call.fmt.units:
        return f"expands weights to int8 rows, which {call.format} has not"
    if call.capability != HOPPER:
        return f"its asynchronous int8 is made for compute capability 9.0, this GPU has {_number(call)}"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"needs torch.float16 or torch.bfloat16, not {call.dtype}"
    others = triton.claims(call)  # whose kernels quantize and expand
    return others if isinstance(others, str) else None


def _number(call: KernelCall) -> str:
    return ".".join(map(str, call.capability or ()))


def prepare(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: Lora | None,
    compute: str,
    activation: str,
) -> Run:
    """What runs such calls, see Backend."""
    if compute == "w4a8-jit":
        from ..triton import layers
        from . import int8_linear

        return int8_linear.prepare(x, layer, bias, lora, activation, layers)
    from . import int4_linear

    return int4_linear.prepare(x, layer, bias, lora, activation)


def order(spec: LayerSpec, compute: str) -> str:
    """Where its INT4 tensor cores run a layer: the order in which a warp's lanes hand a weight over"""
    return "fragments" if compute == "w4a4" else ""


BACKEND = Backend("gluon", claims, prepare, order)
