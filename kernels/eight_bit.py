"""8-bit codes of activations, per group or per row. Definitions, in torch. Those of a weight: Format.expand_rows.

    int8_group  code = round(y / scale) over 64 channels, scale = absmax / 127 rounded up to a 12-bit significand
    int8_row    code = round(y / scale) over a row,       scale = absmax / 127
    fp8_row     code = e4m3(y / scale)  over a row,       scale = absmax / 448

Codes are rounded to nearest even from y times the reciprocal of the scale. NaN and Inf make the scale NaN.
"""

import torch

from .formats import GROUP_SIZE

TOPS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def split_order(codes: torch.Tensor) -> torch.Tensor:
    """In each group of 64 the 32 even columns, then the 32 odd ones: the order in which nibbles come out of bytes

    codes (M, K), K a multiple of 64. Inverse: `natural_order`.
    """
    return codes.unflatten(-1, (-1, GROUP_SIZE // 2, 2)).transpose(-1, -2).flatten(-3)


def natural_order(codes: torch.Tensor) -> torch.Tensor:
    """Inverse of `split_order`."""
    return codes.unflatten(-1, (-1, 2, GROUP_SIZE // 2)).transpose(-1, -2).flatten(-3)


def round_up_12_bits(scales: torch.Tensor) -> torch.Tensor:
    """The next float with a 12-bit significand, so that 1.5 * 2**23 times it is exact in a kernel; float32"""
    return ((scales.view(torch.int32) + 0xFFF) & -0x1000).view(torch.float32)


def _reciprocal(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, 0.0, 1 / scales)


def _scales(y: torch.Tensor, top: float) -> torch.Tensor:
    extreme = y.abs().amax(-1) if y.shape[-1] else y.new_zeros(y.shape[:-1])
    return torch.where(extreme.isfinite(), extreme, torch.nan) / top


def quantize_groups(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes (M, K) int8 in split order, scales (K/64, M) float32) of y (M, K) float32"""
    groups = y.unflatten(-1, (-1, GROUP_SIZE))
    scales = round_up_12_bits(_scales(groups, 127.0))
    codes = torch.nan_to_num(groups * _reciprocal(scales)[..., None]).round()
    return split_order(codes.flatten(-2).to(torch.int8)), scales.T.contiguous()


def decode_groups(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """y[m, k] = code[m, k] * scales[k / 64, m], (M, K) float32 in natural order"""
    groups = natural_order(codes).float().unflatten(-1, (-1, GROUP_SIZE))
    return (groups * scales.T[..., None]).flatten(-2)


def quantize_rows(y: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes (M, K) int8 or float8_e4m3fn, scales (M,) float32) of y (M, K) float32"""
    scales = _scales(y, TOPS[dtype])
    codes = torch.nan_to_num(y * _reciprocal(scales)[:, None])
    codes = codes.round() if dtype == torch.int8 else codes.clamp(-TOPS[dtype], TOPS[dtype])
    return codes.to(dtype), scales
