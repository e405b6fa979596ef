"""w8a8 and w4a8-jit on a CPU, by torch's own product of int8 matrices, which is exact:

    y = (codes(x) @ weight.T) * act_scales * row_scales + (x @ proj_down) @ proj_up.T + bias

codes and act_scales as `eight_bit.quantize_rows` of the smoothed, shifted x; weight and row_scales as the format
expands them, one byte per weight. They are the bytes of w8a8 on a GPU; w8a8 keeps them as far as the memory allows,
w4a8-jit, which streamed layers take, makes them for each call.

Rows are quantized and finished a few at a time, so that what is in between stays in the processor's cache.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from .. import stages
from ..eight_bit import TOPS
from ..layer import Layer, Lora
from ..modes import FEW
from ..weight_cache import ON_CPU
from . import Backend, KernelCall, Run

CLAIM = 10
COMPUTES = ("w8a8", "w4a8-jit")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 256  # of the activation that are multiplied at a time: as fast as more, and the products fit into the cache
PIECE = 1 << 17  # numbers in float32 that are worked on at a time: half a megabyte
Rows = tuple[torch.Tensor, torch.Tensor]
"""(weight (N, K) int8, row_scales (N,) float32)"""


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
    if call.compute not in COMPUTES:
        return f"computes {' and '.join(COMPUTES)}, not {call.compute}"
    if torch.int8 not in call.fmt.units or call.compute not in call.fmt.computes:
        return f"has no {call.compute} for {call.format}"
    if call.dtype not in DTYPES:
        return f"computes in bf16, fp16 or fp32, not {call.dtype}"
    return exact() or CLAIM


def fresh_rows(layer: Layer) -> Rows:
    return layer.spec.fmt.expand_rows(layer.tensors)


def kept_rows(layer: Layer) -> Rows:
    spec = layer.spec
    return ON_CPU.get(layer["qweight"], (spec.format, "int8"), lambda: fresh_rows(layer), spec.n * spec.k)


class Factors(NamedTuple):
    """(x @ down * strength) @ up, of the low-rank branch or a LoRA: down (K, R), up (R, N), strength as in Lora"""

    down: torch.Tensor
    up: torch.Tensor
    strength: torch.Tensor | None


def factors_of(layer: Layer, lora: Lora | None, m: int) -> list[Factors]:
    """In float32"""
    found = []
    if layer.spec.rank:
        found.append(Factors(layer["proj_down"].float(), layer["proj_up"].float().t(), None))
    if lora is not None:
        found.append(Factors(lora.down.float(), lora.up.float().t(), lora.strength))
    # turned once where there are rows enough to gain by it: a product with many columns reads it faster so
    return found if m < FEW else [each._replace(up=each.up.contiguous()) for each in found]


def quantize(
    x: torch.Tensor, layer: Layer, factors: Sequence[Factors], codes: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(scales (M, 1) float32, x @ down * strength of each in float32) of x (M, K); `codes` (M, K) int8 is filled"""
    m, k = x.shape
    scales, acts = torch.empty(m, 1), [torch.empty(m, each.down.shape[1]) for each in factors]
    smooth = layer["smooth_factor"].float()
    rows = rows_of(k)
    scratch, shift = torch.empty(min(m, rows), k), stages.shift_of(smooth[None], layer.spec.act_unsigned)
    for part, coded, scale, *products in pieces(rows, x, codes, scales, *acts):
        wide = part.float()
        for act, (down, _, strength) in zip(products, factors, strict=True):
            stages.weigh_(torch.mm(wide, down, out=act), strength)
        y = torch.empty_like(wide) if wide is part else wide  # x is only read
        torch.div(wide if shift is None else torch.add(wide, shift, out=y), smooth, out=y)
        torch.amax(torch.abs(y, out=head(scratch, len(y))), -1, keepdim=True, out=scale)
        scale.nan_to_num_(torch.nan, torch.nan).div_(TOPS[torch.int8])
        # where the scale is 0 or NaN the codes are any: what they are multiplied by is the same scale
        coded.copy_(y.mul_(scale.reciprocal()).round_())
    return scales, acts


def rows_of(width: int) -> int:
    """Rows of about PIECE numbers"""
    return max(1, PIECE // max(1, width))


def pieces(rows: int, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """So many rows of each tensor at a time; the tensors themselves where they have no more"""
    m = len(tensors[0])
    if m <= rows:
        return [tensors]
    return [tuple(tensor[first : first + rows] for tensor in tensors) for first in range(0, m, rows)]


def head(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    return tensor if len(tensor) == rows else tensor[:rows]


def prepare(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, compute: str, activation: str
) -> Run:
    """See the module docstring."""
    expand, n, k = kept_rows if compute == "w8a8" else fresh_rows, layer.spec.n, layer.spec.k

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        m = x.shape[0]
        y = x.new_empty(m, n)
        if not y.numel():
            return y
        (weight, row_scales), factors = expand(layer), factors_of(layer, lora, m)
        # memory that is used again is in the cache and needs no new pages
        codes = torch.empty(min(m, ROWS), k, dtype=torch.int8)
        products = torch.empty(min(m, ROWS), n, dtype=torch.int32)
        for block, out in pieces(ROWS, x, y):
            coded, product = head(codes, len(block)), head(products, len(block))
            scales, acts = quantize(block, layer, factors, coded)
            torch._int_mm(coded, weight.t(), out=product)
            for part, sums, scale, *some in pieces(rows_of(n), out, product, scales, *acts):
                wide = part.copy_(sums) if part.dtype == torch.float32 else sums.float()
                wide.mul_(scale).mul_(row_scales)
                for act, each in zip(some, factors, strict=True):
                    wide.addmm_(act, each.up)
                if bias is not None:
                    wide += bias
                if activation or wide is not part:
                    part.copy_(stages.activate(wide, activation))
        return y

    return run


BACKEND = Backend("cpu", claims, prepare)
