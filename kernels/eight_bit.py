"""8-bit codes that 4-bit layers compute with: activations per group or per row, weights per row. Definitions, in torch.

    int8_group  code = round(y / scale) over 64 channels, scale = absmax / 127 rounded up to a 12-bit significand
    int8_row    code = round(y / scale) over a row,       scale = absmax / 127
    fp8_row     code = e4m3(y / scale)  over a row,       scale = absmax / 448

Codes are rounded to nearest even from y times the reciprocal of the scale. NaN and Inf make the scale NaN.
A weight's row scale comes from its group scales alone: the largest of them, divided by one of UNITS.
"""

from collections.abc import Mapping

import torch

from .formats.int4 import sign_extend
from .formats.nvfp4 import from_e2m1
from .packing import unpack

GROUP_SIZE = 64
TOPS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# code of a 1 in the row's largest group: with these, every code of that group is an integer (int8) or exact (fp8)
UNITS = {
    ("int4", torch.int8): 15,
    ("nvfp4", torch.int8): 20,
    ("int4", torch.float8_e4m3fn): 32,
    ("nvfp4", torch.float8_e4m3fn): 64,
}


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


def expand_rows(
    format: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor]:
    """W[n, k] = weight[n, k] * row_scales[n]: (weight (N, K) int8 or float8_e4m3fn, row_scales (N,) float32)

    raises  ValueError for a format without a row scale
    """
    if (format, dtype) not in UNITS:
        raise ValueError(f"a {format} weight cannot be expanded to one scale per row in {dtype}")
    nibbles, scales = unpack(tensors["qweight"]), tensors["wscales"].float().T
    values = sign_extend(nibbles).float() if format == "int4" else from_e2m1(nibbles)
    largest = scales.abs().amax(-1, keepdim=True)
    unit = torch.full_like(largest, float(UNITS[format, dtype]))
    factor = torch.where(largest == 0, 0.0, unit / largest)
    weight = (values.unflatten(-1, (scales.shape[1], -1)) * (scales * factor)[..., None]).flatten(-2)
    row_scales = (largest / unit)[:, 0]
    for name in ("wtscale", "wcscales"):
        if name in tensors:
            row_scales = row_scales * tensors[name].float()
    return (weight.round() if dtype == torch.int8 else weight).to(dtype), row_scales
