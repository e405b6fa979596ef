"""A whole layer around the asynchronous int8 kernel: activations int8 per row, the weight expanded to int8 rows."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ...layer import RANK_TILE, Layer, Lora
from ...stages import CodedActivation, activate
from .. import Run
from . import verify
from .int8_async import Int8Gemm, int8_gemm, tiling_of
from .low_rank import LowRank, side_by_side


class RowSteps(Protocol):
    """What is done before the product: codes with one scale per row, of the activation and of the weight."""

    def quantizer(
        self, x: torch.Tensor, layer: Layer, codes: str
    ) -> Callable[[torch.Tensor, Layer], tuple[CodedActivation, torch.Tensor | None]]: ...

    def expander(self, layer: Layer, dtype: torch.dtype) -> Callable[[Layer], Any]: ...


def prepare(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, activation: str, steps: RowSteps
) -> Run:
    """What runs such calls in w4a8-jit; torch's allocator hands out the same scratch memory to every call's weight."""
    spec = layer.spec
    quantize, expand = steps.quantizer(x, layer, "int8_row"), steps.expander(layer, torch.int8)
    n, rank, dtype = spec.n, spec.rank, x.dtype
    lora_rank = 0 if lora is None else lora.down.shape[1]
    has_low_rank, kind = rank + lora_rank > 0, None if bias is None else bias.dtype
    variant = (x.device, dtype, tiling_of(n), has_low_rank, kind)
    gemm = Int8Gemm(x.device, dtype, n, has_low_rank, bias is not None)

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        verify.once(variant, lambda: check(x.device, dtype, n, has_low_rank, kind))
        act, branch_act = quantize(x, layer)
        low_rank = beside(x, layer, branch_act, lora)
        y = gemm(act, expand(layer), low_rank, bias, x.new_empty(x.shape[0], n))
        return activate(y, activation)

    return run


def beside(x: torch.Tensor, layer: Layer, branch_act: torch.Tensor | None, lora: Lora | None) -> LowRank | None:
    """The layer's branch and the LoRA as one pair of factors."""
    pairs = [] if branch_act is None or not layer.spec.rank else [LowRank(branch_act, layer["proj_up"])]
    if lora is not None:
        down, up, strength = lora
        lora_act = x @ down.to(x.dtype)
        if strength is not None:
            columns = layer.once("lora_strength", (strength,), lambda: strength.repeat_interleave(RANK_TILE))
            lora_act = (lora_act * columns[: up.shape[1]]).to(x.dtype)
        pairs.append(LowRank(lora_act, up))
    return side_by_side(pairs, x.dtype)


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


def int8_linear(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, steps: RowSteps
) -> torch.Tensor:
    """One layer on x (M, K), w4a8-jit"""
    lora = None if lora is None else Lora(*lora)
    return prepare(x, layer, bias, lora, "", steps)(x, layer, bias, lora)
