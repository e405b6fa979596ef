"""NVFP4: E2M1 codes, one E4M3 scale per 16 input channels, one scale per tensor or per output channel above them.

Weights: W[n, k] = e2m1(code) * e4m3(wscales[k / 16, n]) * wtscale * wcscales[n]. Activations have no upper scale:
scale = min(absmax / 6, 448) stored as E4M3, and codes are rounded to nearest even from x times the reciprocal of the
*unstored* fp32 scale. The rule `four_six` also tries scale = min(absmax / 4, 448) and keeps, group by group, the one
with the smaller squared error (Four Over Six, arXiv 2512.02010).
Source: NVIDIA NVFP4; the rule of the Nunchaku kernels.
"""

import torch

from ..packing import pack, unpack
from . import SIXTEEN_BIT, Format, Part, Tensors, by_group

GROUP_SIZE = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitude of codes 0..7; bit 3 is the sign
E2M1_MAX = 6.0
E4M3_MAX = 448.0


def weight_parts(n: int, k: int) -> dict[str, Part]:
    return {
        "qweight": Part((n, k // 2), (torch.int8,)),
        "wscales": Part((k // GROUP_SIZE, n), (torch.float8_e4m3fn,)),
        "wtscale": Part((), SIXTEEN_BIT, optional=True),
        "wcscales": Part((n,), SIXTEEN_BIT, optional=True),
    }


def to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 code, ties to the even code, saturating at 6. Returns uint8 nibbles; NaN becomes 0."""
    magnitude = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for lower in range(7):
        middle = (E2M1[lower] + E2M1[lower + 1]) / 2
        code += (magnitude >= middle) if lower % 2 else (magnitude > middle)
    return code | (values < 0).to(torch.uint8) << 3


def from_e2m1(nibbles: torch.Tensor) -> torch.Tensor:
    """Value of each 4-bit code, as float32."""
    table = torch.tensor([*E2M1, *(-magnitude for magnitude in E2M1)], device=nibbles.device)
    return table[nibbles.long()]


def encode_weight(weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """code = e2m1(w / (scale * wtscale)); wtscale = absmax / (6 * 448) so that the group scales use E4M3's full range

    `dtype` is not used: the group scales are E4M3 and the tensor scale stays in fp32.
    """
    groups = by_group(weight.float(), GROUP_SIZE)  # (N, K/16, 16)
    group_max = groups.abs().amax(-1)
    wtscale = group_max.amax() / (E2M1_MAX * E4M3_MAX)
    wtscale = torch.where(wtscale == 0, 1, wtscale)
    scales = (group_max / E2M1_MAX / wtscale).clamp_max(E4M3_MAX).to(torch.float8_e4m3fn)
    divisor = scales.float() * wtscale
    codes = to_e2m1(groups / torch.where(divisor == 0, 1, divisor)[..., None])
    codes = torch.where((divisor == 0)[..., None], 0, codes)
    return {"qweight": pack(codes.flatten(-2)), "wscales": scales.T.contiguous(), "wtscale": wtscale}


def decode_weight(tensors: Tensors) -> torch.Tensor:
    """W[n, k] = e2m1(code) * wscales[k / 16, n] * wtscale * wcscales[n]"""
    values = by_group(from_e2m1(unpack(tensors["qweight"])), GROUP_SIZE)
    scales = tensors["wscales"].float().T
    if "wtscale" in tensors:
        scales = scales * tensors["wtscale"].float()
    if "wcscales" in tensors:
        scales = scales * tensors["wcscales"].float()[:, None]
    return (values * scales[..., None]).flatten(-2)


def quantize_activation(
    x: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0), rule: str = "absmax"
) -> tuple[torch.Tensor, torch.Tensor]:
    """code = e2m1(x / scale); scale = min(absmax of 16 channels / 6, 448), stored as E4M3

    x        (M, K) already smoothed; act_unsigned must be empty, E2M1 has a sign bit
    rule     absmax, or four_six: absmax / 4 where that is nearer
    returns  nibbles (M, K) uint8, ascales (M, K/16) float8_e4m3fn. NaN and Inf make their group's scale NaN.
    """
    groups = by_group(x.float(), GROUP_SIZE)
    absmax = groups.abs().amax(-1, keepdim=True)
    absmax = torch.where(absmax.isfinite(), absmax, torch.nan)
    codes, scales = _codes_at(groups, absmax, E2M1_MAX)
    if rule == "four_six":
        other_codes, other_scales = _codes_at(groups, absmax, 4.0)
        error, other_error = (
            (from_e2m1(found) * stored.float() - groups).square().sum(-1, keepdim=True)
            for found, stored in ((codes, scales), (other_codes, other_scales))
        )
        better = other_error < error
        codes = torch.where(better, other_codes, codes)
        scales = torch.where(better, other_scales.float(), scales.float()).to(torch.float8_e4m3fn)
    return codes.flatten(-2), scales[..., 0]


def _codes_at(groups: torch.Tensor, absmax: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, E4M3 scales) with scale = min(absmax / top, 448)"""
    scales = (absmax / top).clamp_max(E4M3_MAX)
    codes = to_e2m1(groups * torch.where(scales == 0, 0.0, 1 / scales))
    return codes, scales.to(torch.float8_e4m3fn)


def decode_activation(
    codes: torch.Tensor, ascales: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """x[m, k] = e2m1(code[m, k]) * ascales[m, k / 16]"""
    return (by_group(from_e2m1(codes), GROUP_SIZE) * ascales.float()[..., None]).flatten(-2)


FORMAT = Format(
    "nvfp4",
    GROUP_SIZE,
    True,
    weight_parts,
    encode_weight,
    decode_weight,
    quantize_activation,
    decode_activation,
    ("absmax", "four_six"),
)
