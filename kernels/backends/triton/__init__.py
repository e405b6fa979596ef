"""Triton kernels: 8-bit tensor cores from sm_80 on and on AMD, NVFP4 on sm_100 and sm_120.

This file imports no Triton; that happens when the first layer runs on a GPU. With TRITON_INTERPRET=1 the same kernels
run on a CPU, slowly, which is how they are tested without a GPU.
"""

import os
import sys
from typing import Any

import torch

from ...formats import E2M1_CODE, GROUP_SIZE, OFFSET_8, TWOS_COMPLEMENT, Format
from .. import Backend, KernelCall, Run
from . import versions

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CLAIM = 20
# what a code means -> group size that the kernels know
GROUPS = {TWOS_COMPLEMENT: GROUP_SIZE, E2M1_CODE: 16, OFFSET_8: GROUP_SIZE}


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def claims(call: KernelCall) -> int | str:
    """How much these kernels want a call, or why they cannot run it."""
    if call.device.type != "cuda" and not (interpreted() and call.device.type == "cpu"):
        return f"needs an NVIDIA or AMD GPU, this is {call.device.type}"
    if reason := versions.missing():
        return reason
    if call.dtype not in DTYPES:
        return f"computes in bf16, fp16 or fp32, not {call.dtype}"
    if not _has(call.compute, call.fmt):
        return f"has no {call.compute} for {call.format}"
    if not call.asked and call.device.type == "cuda" and call.compute == "w4a4" and not _native_w4a4(call.fmt):
        return "multiplies 4-bit codes of int4 in int8: w4a8 takes the same time and is closer"
    return _gpu_lacks(call) or CLAIM


def knows(fmt: Format) -> bool:
    """Whether the kernels can read a weight of this format themselves; else the format's own code expands it."""
    return GROUPS.get(fmt.code) == fmt.group_size


def _has(compute: str, fmt: Format) -> bool:
    if compute not in fmt.computes:
        return False
    if compute in ("w4a4", "w4a8", "w4a16"):
        return knows(fmt)
    return True  # the rest multiply an expanded weight


def _native_w4a4(fmt: Format) -> bool:
    return fmt.code == E2M1_CODE


def _gpu_lacks(call: KernelCall) -> str | None:
    """Why the instructions of this GPU are not enough"""
    if call.device.type == "cpu" or call.compute == "w16":
        return None
    native = call.compute == "w4a4" and _native_w4a4(call.fmt)
    if call.capability is None:  # AMD
        return f"{call.compute} of {call.format} is made for NVIDIA" if native or call.compute == "fp8" else None
    has = f"this GPU has {call.capability[0]}.{call.capability[1]}"
    if call.capability < (8, 0):
        return f"needs compute capability 8.0 or newer, {has}"
    if native and call.capability[0] not in (10, 12):
        return f"NVFP4 tensor cores need compute capability 10.x or 12.x, {has}"
    if native and call.capability[0] == 12:
        return versions.too_old(versions.LEAST_NVFP4_SM120)
    if call.compute == "fp8" and (call.capability < (8, 9) or call.capability[0] == 12):
        return f"torch multiplies fp8 with row scales on compute capability 8.9 to 10.x, {has}"
    return None


def prepare(*call: Any) -> Run:
    """What runs such calls; see layers.prepare, which imports Triton."""
    from . import layers

    return layers.prepare(*call)


def compiled() -> int:
    """Of all that are started by start.py"""
    start = sys.modules.get(f"{__name__}.start")
    return 0 if start is None else start.compiled()


BACKEND = Backend("triton", claims, prepare, compiled=compiled)
