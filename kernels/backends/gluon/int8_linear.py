"""A whole layer around the asynchronous int8 kernel: activations int8 per row, the weight expanded to int8 rows."""

from typing import Protocol

import torch

from ...layer import Layer, Lora
from . import verify
from .branch import side_by_side
from .int8_async import int8_gemm, tiling_of


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
    qact, ascales, act = steps.quantized(x, layer, "int8_row")
    weight, row_scales = steps.expanded(layer, torch.int8)
    pairs = [(act, layer["proj_up"])] if spec.rank else []
    if lora is not None:
        pairs.append((x @ lora[0].to(x.dtype), lora[1]))
    branch_act, up = side_by_side(pairs, x.dtype)
    n = spec.n
    kind = None if bias is None else bias.dtype
    variant = (x.device, x.dtype, tiling_of(n), up is not None, kind)
    verify.once(variant, lambda: check(x.device, x.dtype, n, up is not None, kind))
    out = x.new_empty(x.shape[0], n)
    return int8_gemm(qact, ascales, weight, row_scales, branch_act, up, bias, out)


def check(
    device: torch.device, dtype: torch.dtype, n: int, branch: bool, bias_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel, exact) for a small product with the tiling that N = n has: ragged rows and depth, several tiles."""
    draw = verify.numbers(device, 0)
    m, k, columns = 300, 784, 2 * tiling_of(n).columns
    a8, w8 = (draw(-127, 128, rows, k, dtype=torch.int8) for rows in (m, columns))
    a_scale, w_scale = (draw(0.01, 0.02, rows, dtype=torch.float32) for rows in (m, columns))
    act, up = (draw(-1, 1, rows, 48, dtype=dtype) if branch else None for rows in (m, columns))
    bias = None if bias_dtype is None else draw(-9, 9, columns, dtype=bias_dtype)
    out = int8_gemm(a8, a_scale, w8, w_scale, act, up, bias, a8.new_empty(m, columns, dtype=dtype))
    wanted = (a8.double() @ w8.double().T) * a_scale[:, None] * w_scale
    if branch:
        wanted += act.double() @ up.double().T
    return out, wanted if bias is None else wanted + bias
