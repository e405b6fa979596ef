"""The steps of a layer in plain torch: the definition of right for what backends fuse, on any device.

Arguments are flat tensors of a Layer and are right already.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)

from . import eight_bit
from .formats import FORMATS, GELU_SHIFT, STOCK_RULE, Tensors
from .layer import RANK_TILE
from .packing import pack

Range = tuple[int, int]


class Coding(NamedTuple):
    """How an activation is written as codes; the table of `quantize_activation` says what each `codes` is.

    act_unsigned  channels that are shifted by GELU_SHIFT; codes of 4 bit are unsigned there
    act_rule      how the scales of 4-bit codes are chosen, one of the format's rules
    """

    codes: str
    act_unsigned: Range = (0, 0)
    act_rule: str = STOCK_RULE


class CodedActivation(NamedTuple):
    """An activation in codes: x ~ qact * ascales, shapes and dtypes as in `quantize_activation`."""

    qact: torch.Tensor
    ascales: torch.Tensor


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
    shift = shift_of(wide, act_unsigned)
    if shift is not None:
        wide = wide + shift
    return wide if smooth_factor is None else wide / smooth_factor.to(wide.dtype)


def shift_of(x: torch.Tensor, act_unsigned: Range) -> torch.Tensor | None:
    """(K,), GELU_SHIFT for the unsigned channels of x (M, K) and 0 for the others; None where there are none."""
    start, stop = act_unsigned
    if start == stop:
        return None
    shift = x.new_zeros(x.shape[-1])
    shift[start:stop] = GELU_SHIFT
    return shift


def quantize_activation(
    x: torch.Tensor,
    smooth_factor: torch.Tensor | None,
    proj_down: torch.Tensor | None,
    coding: Coding,
    act_mean: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qact = round((x - act_mean + shift) / smooth_factor / scale), branch_act = x @ proj_down

    x             (M, K) bf16, fp16 or fp32
    coding.codes  | qact                              | ascales
      a format    | (M, K/2) int8, low nibble = even  | (K/group, M), as the format has it
      int8_group  | (M, K) int8, kernels/eight_bit.py | (K/64, M) float32, absmax / 127
      int8_row    | (M, K) int8                       | (M,) float32, absmax / 127
      fp8_row     | (M, K) float8_e4m3fn              | (M,) float32, absmax / 448
    returns  qact, ascales, branch_act (M, R) in the dtype of x, R = 0 without proj_down. A group (row) with NaN or Inf
             has the scale NaN
    """
    codes, act_unsigned, act_rule = coding
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


def low_rank(act: torch.Tensor, up: torch.Tensor, strength: torch.Tensor | None = None) -> torch.Tensor:
    """(act * strength of each RANK_TILE columns) @ up.T in the dtype of act

    act (M, R), up (N, R), strength (ceil(R / RANK_TILE),): of the layer's branch or of a LoRA
    """
    return weighted(act, strength) @ up.to(act.dtype).T


def weighted(columns: torch.Tensor, strength: torch.Tensor | None) -> torch.Tensor:
    """columns * strength of each RANK_TILE of them, rounded once to the dtype of `columns`

    columns (..., R), strength (ceil(R / RANK_TILE),) float32 or None
    """
    if strength is None:
        return columns
    return (columns * strength.repeat_interleave(RANK_TILE)[: columns.shape[-1]]).to(columns.dtype)


def weigh_(columns: torch.Tensor, strength: torch.Tensor | None) -> torch.Tensor:
    """`weighted`, in place of columns (M, R), whose rows may lie apart

    >>> weigh_(torch.ones(1, 20), torch.tensor([2.0, 3.0]))[0, 15:17]
    tensor([2., 3.])
    """
    width = columns.shape[1]
    if strength is not None and width % RANK_TILE:
        columns.mul_(strength.repeat_interleave(RANK_TILE)[:width])
    elif strength is not None:
        columns.view(-1, width // RANK_TILE, RANK_TILE).mul_(strength[:, None])
    return columns


def activate(y: torch.Tensor, activation: str) -> torch.Tensor:
    """y, GELU (tanh form) of y, or SiLU of y"""
    if activation == "gelu":
        return F.gelu(y, approximate="tanh")
    return F.silu(y) if activation == "silu" else y


def channel_scales_of(tensors: Tensors) -> torch.Tensor:
    """wtscale * wcscales, (N,) float32; ones for a layer that has neither"""
    wtscale, wcscales, qweight = tensors.get("wtscale"), tensors.get("wcscales"), tensors["qweight"]
    if wcscales is not None:
        return wcscales.float() if wtscale is None else wcscales.float() * wtscale.float()
    scales = qweight.new_empty(qweight.shape[0], dtype=torch.float32)
    return scales.fill_(1.0) if wtscale is None else scales.copy_(wtscale)
