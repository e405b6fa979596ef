"""Plain torch on any device: the definition of right.

Every sum is kept in float32 (float64 for a float64 activation) and rounded once at the end:

    w4a4           y = Q((x - act_mean + shift) / smooth) @ decode(qweight).T + out_mean
                       + (x @ proj_down) @ proj_up.T + bias
    w16, w4a16     the same without Q and means: what a dense layer holding the decoded weight would give
    w4a8           Q rounds to int8 with one scale per 64 channels
    w8a8, w4a8-jit, fp8   Q rounds to 8 bit with one scale per row, and so does the weight, see kernels/eight_bit.py

On a CPU the decoded weights are kept, as far as a quarter of the memory allows, so that a step costs about what the
16-bit model costs. The numbers are the same with and without.
"""

import os
from functools import cache

import torch

from .. import eight_bit, stages
from ..layer import Layer
from ..roundtrip import rounded
from ..weight_cache import WeightCache
from . import Backend, Call

COMPUTES = ("w4a4", "w4a8", "w8a8", "w4a8-jit", "fp8", "w16", "w4a16")
BUDGET = 0.25  # of the machine's memory, for decoded weights of all models together


@cache
def budget() -> int:
    """Bytes of decoded weights that may be kept; none where the machine does not say how much memory it has."""
    try:
        return int(BUDGET * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # Windows
        return _budget_from_psutil()


def _budget_from_psutil() -> int:
    try:
        import psutil  # ComfyUI brings it
    except ImportError:
        return 0
    return int(BUDGET * psutil.virtual_memory().total)


WEIGHTS = WeightCache(budget)


def refuses(call: Call) -> str | None:
    if call.compute not in COMPUTES:
        return f"computes {', '.join(COMPUTES)}, not {call.compute}"
    if call.format == "awq_w4a16":
        return None if call.compute in ("w4a4", "w16", "w4a16") else f"{call.format} has no {call.compute}"
    if call.compute == "w4a16":
        return f"w4a16 is for awq_w4a16, this layer is {call.format}"
    if call.compute == "w4a8" and call.format != "int4":
        return f"w4a8 is for int4, this layer is {call.format}"
    return None


def decoded_weight(layer: Layer) -> torch.Tensor:
    """layer.decode_weight(), kept on a CPU."""
    qweight = layer["qweight"]
    if qweight.device.type != "cpu" or qweight.numel() == 0:
        return layer.decode_weight()
    spec = layer.spec
    return WEIGHTS.get(qweight, (spec.format,), layer.decode_weight, 4 * spec.n * spec.k)


def smooth_activation(x: torch.Tensor, layer: Layer, act_mean: torch.Tensor | None = None) -> torch.Tensor:
    """(x - act_mean + shift) / smooth_factor, computed in fp32 and rounded once to the dtype of x. x is (M, K)."""
    return stages.smoothed(x, layer["smooth_factor"], layer.spec.act_unsigned, act_mean).to(x.dtype)


def _smoothed(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return stages.smoothed(x, layer["smooth_factor"], layer.spec.act_unsigned).float()


def _rounded_to_rows(x: torch.Tensor, layer: Layer, dtype: torch.dtype) -> torch.Tensor:
    """The product of both sides in 8 bit, one scale per row"""
    codes, scales = eight_bit.quantize_rows(_smoothed(x, layer), dtype)
    weight, row_scales = eight_bit.expand_rows(layer.spec.format, layer.tensors, dtype)
    return (codes.to(scales.dtype) @ weight.to(scales.dtype).T) * scales[:, None] * row_scales


def product(x: torch.Tensor, layer: Layer, compute: str) -> torch.Tensor:
    """The layer without its branches and bias, on x (M, K), in float32 or float64."""
    spec, fmt = layer.spec, layer.spec.fmt
    wide = stages.wide_dtype(x)
    if not fmt.low_rank:
        return x.to(wide) @ decoded_weight(layer).to(wide).T
    if compute in ("w8a8", "w4a8-jit"):
        return _rounded_to_rows(x, layer, torch.int8).to(wide)
    if compute == "fp8":
        return _rounded_to_rows(x, layer, torch.float8_e4m3fn).to(wide)
    if compute == "w4a8":
        act = eight_bit.decode_groups(*eight_bit.quantize_groups(_smoothed(x, layer)))
    else:
        act = smooth_activation(x, layer, layer.tensors.get("act_mean") if compute == "w4a4" else None)
        if compute == "w4a4" and fmt.quantize_activation is not None and x.shape[0]:
            act = rounded(act, spec)
    return act.to(wide) @ decoded_weight(layer).to(wide).T


def linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: tuple[torch.Tensor, torch.Tensor] | None,
    compute: str,
    lora_strength: torch.Tensor | None = None,
    activation: str = "",
) -> torch.Tensor:
    """One layer on x (M, K); see the module docstring. Returns (M, N) in the dtype of x."""
    y = product(x, layer, compute)
    if compute == "w4a4":
        bias = layer.centred_bias(bias)
    wide = x.to(y.dtype)
    if layer.spec.rank:
        y += stages.branch(wide @ layer["proj_down"].to(y.dtype), layer["proj_up"])
    if lora is not None:
        down, up = lora
        y += stages.branch(wide @ down.to(y.dtype), up, lora_strength)
    if bias is not None:
        y += bias.to(y.dtype)
    return stages.activate(y, activation).to(x.dtype)


BACKEND = Backend("reference", 0, refuses, linear, True, stages.STAGES)
