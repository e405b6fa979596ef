"""Triton kernels: 8-bit tensor cores from sm_80 on and on AMD, NVFP4 on sm_100 and sm_120.

This file imports no Triton; that happens when the first layer runs on a GPU. With TRITON_INTERPRET=1 the same kernels
run on a CPU, slowly, which is how they are tested without a GPU.
"""

import os
from typing import Any

import torch

from .. import Backend, Call
from . import versions

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = {
    "w4a4": ("int4", "nvfp4"),
    "w4a8": ("int4",),
    "w8a8": ("int4", "nvfp4"),
    "w4a8-jit": ("int4", "nvfp4"),
    "fp8": ("int4", "nvfp4"),
    "w16": ("int4", "nvfp4", "awq_w4a16"),
    "w4a16": ("awq_w4a16",),
}


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuses(call: Call) -> str | None:
    if call.device.type != "cuda" and not (interpreted() and call.device.type == "cpu"):
        return f"needs an NVIDIA or AMD GPU, this is {call.device.type}"
    if reason := versions.missing():
        return reason
    if call.dtype not in DTYPES:
        return f"computes in bf16, fp16 or fp32, not {call.dtype}"
    if call.format not in FORMATS.get(call.compute, ()):
        return f"has no {call.compute} for {call.format}"
    return _gpu_lacks(call)


def _gpu_lacks(call: Call) -> str | None:
    """Why the instructions of this GPU are not enough"""
    if call.device.type == "cpu" or call.compute == "w16":
        return None
    if call.capability is None:  # AMD
        if call.compute == "fp8" or (call.compute, call.format) == ("w4a4", "nvfp4"):
            return f"{call.compute} of {call.format} is made for NVIDIA"
        return None
    has = f"this GPU has {call.capability[0]}.{call.capability[1]}"
    if call.capability < (8, 0):
        return f"needs compute capability 8.0 or newer, {has}"
    if (call.compute, call.format) == ("w4a4", "nvfp4") and call.capability[0] not in (10, 12):
        return f"NVFP4 tensor cores need compute capability 10.x or 12.x, {has}"
    if (call.compute, call.format, call.capability[0]) == ("w4a4", "nvfp4", 12):
        return versions.too_old(versions.LEAST_NVFP4_SM120)
    if call.compute == "fp8" and (call.capability < (8, 9) or call.capability[0] == 12):
        return f"torch multiplies fp8 with row scales on compute capability 8.9 to 10.x, {has}"
    return None


def linear(*args: Any, **epilogue: Any) -> torch.Tensor:
    """One layer; see layers.linear, which imports Triton."""
    from . import layers

    return layers.linear(*args, **epilogue)


def _stage(name: str) -> Any:
    def step(*args: Any) -> Any:
        from . import steps

        return getattr(steps, name)(*args)

    return step


STAGES = ("quantize_activation", "linear_w4", "linear_w4_requantize", "expand_weight", "linear_w8a8", "gemv_w4a16")
BACKEND = Backend("triton", 20, refuses, linear, True, {name: _stage(name) for name in STAGES})
