"""A whole layer around the asynchronous int8 kernel: activations int8 per row, the weight expanded to int8 rows."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ...layer import Layer, Lora
from ...stages import CodedActivation, activate
from .. import Run
from . import verify
from .int8_async import Int8Gemm, int8_gemm, tiling_of
from .low_rank import LowRank, beside


class RowSteps(Protocol):
    """What is done before the product: codes with one scale per row, of the activation and of the weight."""

    def quantizer(
        self, x: torch.Tensor, layer: Layer, codes: str, lora: Lora | None
    ) -> Callable[[torch.Tensor, Layer, Lora | None], tuple[CodedActivation, torch.Tensor | None]]: ...

    def expander(self, layer: Layer, dtype: torch.dtype) -> Callable[[Layer], Any]: ...


def prepare(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, activation: str, steps: RowSteps
) -> Run:
    """What runs such calls in w4a8-jit; torch's allocator hands out the same scratch memory to every call's weight."""
    n, dtype, kind = layer.spec.n, x.dtype, None if bias is None else bias.dtype
    has_low_rank = layer.spec.rank + (0 if lora is None else lora.down.shape[1]) > 0
    variant = (x.device, dtype, tiling_of(n), has_low_rank, kind)
    verify.once(variant, lambda: check(x.device, dtype, n, has_low_rank, kind))
    quantize, expand = steps.quantizer(x, layer, "int8_row", lora), steps.expander(layer, torch.int8)
    factors, gemm = beside(layer, lora, dtype), Int8Gemm(x.device, dtype, n, has_low_rank)

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        coded, act = quantize(x, layer, lora)
        low_rank = factors(act, layer, lora)
        y = gemm(coded, expand(layer), low_rank, bias, x.new_empty(x.shape[0], n))
        return activate(y, activation) if activation else y

    return run


def check(
    device: torch.device, dtype: torch.dtype, n: int, has_low_rank: bool, bias_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel, exact) for a small product with the tiling that N = n has: ragged rows and depth, several tiles."""
    draw = verify.numbers(device, 0)
    m, k, columns = 300, 784, 2 * tiling_of(n).columns
    a8, w8 = (draw(-127, 128, rows, k, dtype=torch.int8) for rows in (m, columns))
    a_scale, w_scale = (draw(0.01, 0.02, rows, dtype=torch.float32) for rows in (m, columns))
    low_rank = LowRank(*(draw(-1, 1, rows, 48, dtype=dtype) for rows in (m, columns))) if has_low_rank else None
    bias = None if bias_dtype is None else draw(-9, 9, columns, dtype=bias_dtype)
    act = CodedActivation(a8, a_scale)
    out = int8_gemm(act, w8, w_scale, low_rank, bias, a8.new_empty(m, columns, dtype=dtype))
    wanted = (a8.double() @ w8.double().T) * a_scale[:, None] * w_scale
    if low_rank is not None:
        wanted += low_rank.act.double() @ low_rank.up.double().T
    return out, wanted if bias is None else wanted + bias
