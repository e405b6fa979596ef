"""w8a8 on a CPU, by torch's own product of int8 matrices, which is exact:

    y = (codes(x) @ weight.T) * act_scales * row_scales + (x @ proj_down) @ proj_up.T + bias

codes and act_scales as `eight_bit.quantize_rows` of the smoothed, shifted x; weight and row_scales as the format
expands them, one byte per weight, kept as far as the memory allows. They are the bytes of w8a8 on a GPU.

Rows are quantized and finished a few at a time, so that what is in between stays in the processor's cache.
"""

from collections.abc import Sequence
from functools import cache

import torch

from .. import stages
from ..eight_bit import TOPS
from ..layer import Layer, Lora
from ..modes import FEW
from ..weight_cache import ON_CPU
from . import Backend, KernelCall, each_call

CLAIM = 10
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 256  # of the activation that are multiplied at a time: as fast as more, and the products fit into the cache
PIECE = 1 << 17  # numbers in float32 that are worked on at a time: half a megabyte
Factors = tuple[torch.Tensor, torch.Tensor]
"""(down (K, R), up (R, N)) float32"""


@cache
def exact() -> str | None:
    """Why torch's int8 product is not to be used here, or None where the processor has the instructions for it."""
    has = getattr(torch.cpu, "_is_vnni_supported", None)
    if has is None or not has():
        return "needs a processor with VNNI, whose int8 products are exact and fast"
    left, right = (torch.full(shape, code, dtype=torch.int8) for shape, code in (((2, 256), -128), ((256, 2), 127)))
    try:
        right_one = bool((torch._int_mm(left, right) == -128 * 127 * 256).all())
    except RuntimeError as error:
        return f"torch multiplies no int8 here: {str(error).splitlines()[0]}"
    return None if right_one else "torch's product of int8 matrices is not exact on this processor"


def claims(call: KernelCall) -> int | str:
    """Layers with int8 rows, where torch multiplies such rows exactly."""
    if call.device.type != "cpu":
        return f"needs a CPU, this is {call.device.type}"
    if call.compute != "w8a8":
        return f"computes w8a8, not {call.compute}"
    if torch.int8 not in call.fmt.units or call.compute not in call.fmt.computes:
        return f"has no {call.compute} for {call.format}"
    if call.dtype not in DTYPES:
        return f"computes in bf16, fp16 or fp32, not {call.dtype}"
    return exact() or CLAIM


def kept_rows(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight (N, K) int8, row_scales (N,) float32)"""
    spec = layer.spec
    size = spec.n * spec.k
    return ON_CPU.get(layer["qweight"], (spec.format, "int8"), lambda: spec.fmt.expand_rows(layer.tensors), size)


def factors_of(layer: Layer, lora: Lora | None, m: int) -> list[Factors]:
    """The low-rank branch and the LoRA; its strengths go onto the columns of up."""
    found = []
    if layer.spec.rank:
        found.append((layer["proj_down"].float(), layer["proj_up"].float().T))
    if lora is not None:
        up = stages.weighted(lora.up.float(), lora.strength)
        found.append((lora.down.float(), up.T))
    # turned once where there are rows enough to gain by it: a product with many columns reads it faster so
    return found if m < FEW else [(down, up.contiguous()) for down, up in found]


def quantize(
    x: torch.Tensor, layer: Layer, downs: Sequence[torch.Tensor], codes: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(scales (M, 1) float32, x @ down of each in float32) of x (M, K); `codes` (M, K) int8 is filled"""
    m, k = x.shape
    scales, acts = torch.empty(m, 1), [torch.empty(m, down.shape[1]) for down in downs]
    smooth = layer["smooth_factor"].float()
    stretches = pieces(m, k)
    smoothed, sizes = (torch.empty(min(m, stretches[0].stop), k) for _ in range(2))
    shift = stages.shift_of(smoothed, layer.spec.act_unsigned)
    for rows in stretches:
        wide, scale = x[rows].float(), scales[rows]
        y, size = smoothed[: len(wide)], sizes[: len(wide)]
        for act, down in zip(acts, downs, strict=True):
            torch.mm(wide, down, out=act[rows])
        torch.div(wide if shift is None else torch.add(wide, shift, out=y), smooth, out=y)
        torch.amax(torch.abs(y, out=size), -1, keepdim=True, out=scale)
        scale.nan_to_num_(torch.nan, torch.nan).div_(TOPS[torch.int8])
        # where the scale is 0 or NaN the codes are any: what they are multiplied by is the same scale
        codes[rows] = y.mul_(scale.reciprocal()).round_()
    return scales, acts


def pieces(m: int, width: int) -> list[slice]:
    """Rows in stretches of about PIECE numbers each."""
    rows = max(1, PIECE // max(1, width))
    return [slice(first, first + rows) for first in range(0, m, rows)]


def linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: Lora | None,
    compute: str,
    activation: str = "",
) -> torch.Tensor:
    """One layer on x (M, K); see the module docstring. Returns (M, N) in the dtype of x."""
    spec, m = layer.spec, x.shape[0]
    y = x.new_empty(m, spec.n)
    if not y.numel():
        return y
    (weight, row_scales), factors = kept_rows(layer), factors_of(layer, lora, m)
    # memory that is used again is in the cache and needs no new pages
    codes = torch.empty(min(m, ROWS), spec.k, dtype=torch.int8)
    products = torch.empty(min(m, ROWS), spec.n, dtype=torch.int32)
    for first in range(0, m, ROWS):
        block, out = x[first : first + ROWS], y[first : first + ROWS]
        count = len(block)
        scales, acts = quantize(block, layer, [down for down, _ in factors], codes[:count])
        torch._int_mm(codes[:count], weight.T, out=products[:count])
        for rows in pieces(count, spec.n):
            piece = out[rows] if out.dtype == torch.float32 else torch.empty_like(out[rows], dtype=torch.float32)
            piece.copy_(products[:count][rows]).mul_(scales[rows]).mul_(row_scales)
            for act, (_, up) in zip(acts, factors, strict=True):
                piece.addmm_(act[rows], up)
            if bias is not None:
                piece += bias
            if activation or piece.dtype != out.dtype:
                out[rows] = stages.activate(piece, activation)
    return y


BACKEND = Backend("cpu", claims, each_call(linear, epilogue=True))
