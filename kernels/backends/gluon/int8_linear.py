"""A whole layer around the asynchronous int8 kernel: activations int8 per row, the weight expanded to int8 rows."""

from typing import Protocol

import torch

from ...layer import Layer, Lora
from ...stages import CodedActivation
from . import verify
from .int8_async import int8_gemm, tiling_of
from .low_rank import LowRank, side_by_side


class RowSteps(Protocol):
    """What is done before the product: codes with one scale per row, of the activation and of the weight."""

    def quantized(
        self, x: torch.Tensor, layer: Layer, codes: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]: ...

    def expanded(self, layer: Layer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]: ...


def int8_linear(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, steps: RowSteps
) -> torch.Tensor:
    """One layer on x (M, K), w4a8-jit; torch's allocator hands out the same scratch memory to every call's weight."""
    spec = layer.spec
    qact, ascales, branch_act = steps.quantized(x, layer, "int8_row")
    weight, row_scales = steps.expanded(layer, torch.int8)
    pairs = [LowRank(branch_act, layer["proj_up"])] if spec.rank and branch_act is not None else []
    if lora is not None:
        pairs.append(LowRank(x @ lora[0].to(x.dtype), lora[1]))
    low_rank = side_by_side(pairs, x.dtype)
    n = spec.n
    kind = None if bias is None else bias.dtype
    variant = (x.device, x.dtype, tiling_of(n), low_rank is not None, kind)
    verify.once(variant, lambda: check(x.device, x.dtype, n, low_rank is not None, kind))
    out = x.new_empty(x.shape[0], n)
    return int8_gemm(CodedActivation(qact, ascales), weight, row_scales, low_rank, bias, out)


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
