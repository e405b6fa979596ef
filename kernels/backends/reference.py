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

import torch

from .. import eight_bit, stages
from ..layer import Layer, Lora
from ..roundtrip import rounded
from ..weight_cache import ON_CPU
from . import Backend, KernelCall, each_call


def claims(call: KernelCall) -> int | str:
    """Everything that a format defines, as the last resort: on a GPU by itself only what is no emulation."""
    if call.compute not in call.fmt.computes:
        return f"{call.format} has {', '.join(call.fmt.computes)}, not {call.compute}"
    if not call.asked and call.arch != "cpu" and call.compute not in ("w16", "w4a16"):
        return f"emulates {call.compute} in plain torch, which is for a CPU"
    if not call.asked and call.compute == "w8a8":
        return "expands the weight anew for each call of w8a8"
    return 0


def decoded_weight(layer: Layer) -> torch.Tensor:
    """layer.decode_weight(), kept on a CPU."""
    qweight = layer["qweight"]
    if qweight.device.type != "cpu" or qweight.numel() == 0:
        return layer.decode_weight()
    spec = layer.spec
    return ON_CPU.get(qweight, (spec.format,), layer.decode_weight, 4 * spec.n * spec.k)


def smooth_activation(x: torch.Tensor, layer: Layer, act_mean: torch.Tensor | None = None) -> torch.Tensor:
    """(x - act_mean + shift) / smooth_factor, computed in fp32 and rounded once to the dtype of x. x is (M, K)."""
    return stages.smoothed(x, layer["smooth_factor"], layer.spec.act_unsigned, act_mean).to(x.dtype)


def _smoothed(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return stages.smoothed(x, layer["smooth_factor"], layer.spec.act_unsigned).float()


def _rounded_to_rows(x: torch.Tensor, layer: Layer, dtype: torch.dtype) -> torch.Tensor:
    """The product of both sides in 8 bit, one scale per row"""
    codes, scales = eight_bit.quantize_rows(_smoothed(x, layer), dtype)
    weight, row_scales = layer.spec.fmt.expand_rows(layer.tensors, dtype)
    return (codes.to(scales.dtype) @ weight.to(scales.dtype).T) * scales[:, None] * row_scales


def product(x: torch.Tensor, layer: Layer, compute: str) -> torch.Tensor:
    """The layer without low-rank branch, LoRA and bias, on x (M, K), in float32 or float64."""
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
        if compute == "w4a4":
            act = rounded(act, spec)
    return act.to(wide) @ decoded_weight(layer).to(wide).T


def linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: Lora | None,
    compute: str,
    activation: str = "",
) -> torch.Tensor:
    """One layer on x (M, K); see the module docstring. Returns (M, N) in the dtype of x."""
    y = product(x, layer, compute)
    if compute == "w4a4":
        bias = layer.centred_bias(bias)
    wide = x.to(y.dtype)
    if layer.spec.rank:
        y += stages.low_rank(wide @ layer["proj_down"].to(y.dtype), layer["proj_up"])
    if lora is not None:
        down, up, strength = Lora(*lora)
        y += stages.low_rank(wide @ down.to(y.dtype), up, strength)
    if bias is not None:
        y += bias.to(y.dtype)
    return stages.activate(y, activation).to(x.dtype)


BACKEND = Backend("reference", claims, each_call(linear, epilogue=True))
