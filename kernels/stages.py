"""The single steps of a layer in plain torch: the definition of right for the public operations, on any device.

Arguments are flat tensors and are right already; shapes stand in kernels/__init__.py. A backend that has these steps
lists functions of the same arguments under the same names.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)

from . import eight_bit
from .formats import FORMATS
from .formats.int4 import GELU_SHIFT
from .packing import pack, unpack

Range = tuple[int, int]
Tensors = dict[str, torch.Tensor]


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for a float64 activation, else float32: what every sum is kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def smoothed(
    x: torch.Tensor, smooth_factor: torch.Tensor | None, act_unsigned: Range, act_mean: torch.Tensor | None = None
) -> torch.Tensor:
    """(x - act_mean + shift) / smooth_factor, not rounded. x is (M, K)."""
    wide = x.to(wide_dtype(x))
    if act_mean is not None:
        wide = wide - act_mean.to(wide.dtype)
    start, stop = act_unsigned
    if start != stop:
        shift = torch.zeros(x.shape[-1], dtype=wide.dtype, device=x.device)
        shift[start:stop] = GELU_SHIFT
        wide = wide + shift
    return wide if smooth_factor is None else wide / smooth_factor.to(wide.dtype)


def quantize_activation(
    x: torch.Tensor,
    smooth_factor: torch.Tensor | None,
    proj_down: torch.Tensor | None,
    codes: str,
    act_unsigned: Range,
    act_rule: str = "absmax",
    act_mean: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(qact, ascales, branch_act) of x (M, K)"""
    y = smoothed(x, smooth_factor, act_unsigned, act_mean)
    if codes == "int8_group":
        qact, ascales = eight_bit.quantize_groups(y.float())
    elif codes in ("int8_row", "fp8_row"):
        qact, ascales = eight_bit.quantize_rows(y.float(), torch.int8 if codes == "int8_row" else torch.float8_e4m3fn)
    else:
        nibbles, scales = FORMATS[codes].quantize_activation(y.to(x.dtype), act_unsigned, act_rule)
        qact, ascales = pack(nibbles), scales.T.contiguous()
    if proj_down is None:
        return qact, ascales, x.new_empty(x.shape[0], 0)
    return qact, ascales, (x.to(y.dtype) @ proj_down.to(y.dtype)).to(x.dtype)


def branch(act: torch.Tensor, up: torch.Tensor, strength: torch.Tensor | None = None) -> torch.Tensor:
    """(act * strength of each 16 columns) @ up.T in the dtype of act. act (M, R), up (N, R), strength (ceil(R/16),)"""
    return weighted(act, strength) @ up.to(act.dtype).T


def weighted(columns: torch.Tensor, strength: torch.Tensor | None) -> torch.Tensor:
    """columns (..., R) * strength of each 16 columns (ceil(R/16),) float32, rounded once to the dtype of `columns`"""
    if strength is None:
        return columns
    return (columns * strength.repeat_interleave(16)[: columns.shape[-1]]).to(columns.dtype)


def activate(y: torch.Tensor, activation: str) -> torch.Tensor:
    """y, GELU (tanh form) of y, or SiLU of y"""
    if activation == "gelu":
        return F.gelu(y, approximate="tanh")
    return F.silu(y) if activation == "silu" else y


def finish(
    y: torch.Tensor,
    branch_act: torch.Tensor | None,
    proj_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """act(y + branch_act @ proj_up.T + bias), rounded once"""
    if proj_up is not None and branch_act is not None:
        y = y + branch(branch_act.to(y.dtype), proj_up)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return activate(y, activation).to(dtype)


def linear_w4(
    qact: torch.Tensor,
    ascales: torch.Tensor,
    weights: Tensors,
    branch_act: torch.Tensor | None,
    proj_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    act_unsigned: Range,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """4-bit weights with activations in the same codes, or in 8 bit if qact is (M, K)"""
    fmt = FORMATS[format]
    if qact.shape[1] == 2 * weights["qweight"].shape[1]:
        act = eight_bit.decode_groups(qact, ascales)
    else:
        act = fmt.decode_activation(unpack(qact), ascales.T, act_unsigned)
    return finish(act @ fmt.decode_weight(weights).T, branch_act, proj_up, bias, activation, dtype)


def linear_w4_requantize(
    qact: torch.Tensor,
    ascales: torch.Tensor,
    weights: Tensors,
    branch_act: torch.Tensor | None,
    proj_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    next_smooth: torch.Tensor,
    act_unsigned: Range,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, its unsigned codes, their scales) with y = GELU(int4 layer), codes as the next layer would make them of y"""
    y = linear_w4(qact, ascales, weights, branch_act, proj_up, bias, "int4", act_unsigned, "gelu", dtype)
    return y, *quantize_activation(y, next_smooth, None, "int4", (0, y.shape[1]))[:2]


def expand_weight(weights: Tensors, format: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight (N, K) in int8 or float8_e4m3fn, row_scales (N,))"""
    return eight_bit.expand_rows(format, weights, dtype)


def linear_w8a8(
    qact: torch.Tensor,
    ascales: torch.Tensor,
    weight: torch.Tensor,
    row_scales: torch.Tensor,
    branch_act: torch.Tensor | None,
    proj_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """int8 rows on both sides. The integer sums are exact in float64"""
    y = (qact.double() @ weight.double().T).float() * ascales[:, None] * row_scales
    return finish(y, branch_act, proj_up, bias, activation, dtype)


def gemv_w4a16(x: torch.Tensor, weights: Tensors, bias: torch.Tensor | None) -> torch.Tensor:
    """awq_w4a16 weights with activations as they are"""
    wide = x.to(wide_dtype(x))
    y = wide @ FORMATS["awq_w4a16"].decode_weight(weights).to(wide.dtype).T
    return finish(y, None, None, bias, "", x.dtype)


STAGES: dict[str, Callable] = {
    function.__name__: function
    for function in (quantize_activation, linear_w4, linear_w4_requantize, expand_weight, linear_w8a8, gemv_w4a16)
}
