"""INT4: two's-complement codes, one scale per 64 input channels.

A nibble can hold -8..7. Weights and signed activations are emitted in -7..7 with scale = absmax / 7 (a recipe may use
-8 as well); readers decode all sixteen codes. Inputs that come out of a GELU are shifted up by GELU_SHIFT, so that
they are never negative, and use the unsigned codes 0..15 with scale = max / 15.

Rounding (activations): the scale is computed in fp32 and stored in the dtype of x; codes are rounded to nearest even
from x * (1 / scale) with the *unstored* fp32 scale, then saturated. The rule `signed_extreme` uses all sixteen codes
of signed groups: scale = -(element of largest magnitude) / 8, so that this element is code -8 whatever its sign.
Source: SVDQuant, arXiv 2411.05007; the rule of the Nunchaku kernels. Layout: quantize/files/dialects/native.py.
"""

import torch

from ..packing import pack, sign_extend, unpack
from . import SIXTEEN_BIT, Format, Part, Tensors, by_group

GROUP_SIZE = 64
GELU_SHIFT = 0.171875  # 11/64: just above -min(GELU) = 0.1700, so that shifted activations fit unsigned codes


def weight_parts(n: int, k: int) -> dict[str, Part]:
    return {
        "qweight": Part((n, k // 2), (torch.int8,)),
        "wscales": Part((k // GROUP_SIZE, n), SIXTEEN_BIT),
    }


def encode_weight(weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """code = round(w / scale), scale = absmax of the group / 7, rounded to `dtype` first so that decoding is exact."""
    groups = by_group(weight.float(), GROUP_SIZE)  # (N, K/64, 64)
    scales = (groups.abs().amax(-1) / 7).to(dtype)
    divisor = torch.where(scales == 0, 1, scales.float())
    codes = (groups / divisor[..., None]).round().clamp(-7, 7)
    return {"qweight": pack(codes.flatten(-2).to(torch.int8)), "wscales": scales.T.contiguous()}


def decode_weight(tensors: Tensors) -> torch.Tensor:
    """W[n, k] = code[n, k] * wscales[k / 64, n]"""
    codes = by_group(sign_extend(unpack(tensors["qweight"])).float(), GROUP_SIZE)
    return (codes * tensors["wscales"].T.float()[..., None]).flatten(-2)


def _unsigned_groups(k: int, act_unsigned: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(K/64, 1) bool: the groups inside the unsigned channel range."""
    start, stop = act_unsigned
    first = torch.arange(0, k, GROUP_SIZE, device=device)
    return ((first >= start) & (first < stop))[:, None]


def quantize_activation(
    x: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0), rule: str = "absmax"
) -> tuple[torch.Tensor, torch.Tensor]:
    """code = round(x / scale) to nibbles; scale = absmax / 7, or max / 15 for channels in the range `act_unsigned`

    x        (M, K) already smoothed (and shifted where unsigned)
    rule     absmax, or signed_extreme: scale = -extreme / 8 in signed groups
    returns  nibbles (M, K) uint8, ascales (M, K/64) in the dtype of x. NaN and Inf make their group's scale NaN.
    """
    groups = by_group(x.float(), GROUP_SIZE)  # (M, K/64, 64)
    unsigned = _unsigned_groups(x.shape[-1], act_unsigned, x.device)
    extreme = torch.where(unsigned, groups, groups.abs()).amax(-1, keepdim=True).clamp_min(0)
    extreme = torch.where(extreme.isfinite(), extreme, torch.nan)
    scales = extreme / torch.where(unsigned, 15.0, 7.0)
    if rule == "signed_extreme":
        largest = groups.amax(-1, keepdim=True)
        signed = torch.where(largest >= extreme, -extreme, extreme) / 8  # NaN compares false and stays NaN
        scales = torch.where(unsigned, scales, signed)
    reciprocal = torch.where(scales == 0, 0.0, 1 / scales)
    codes = torch.nan_to_num(groups * reciprocal).round()
    codes = torch.where(unsigned, codes.clamp(0, 15), codes.clamp(-8, 7))
    return (codes.flatten(-2).to(torch.int16) & 15).to(torch.uint8), scales[..., 0].to(x.dtype)


def decode_activation(
    codes: torch.Tensor, ascales: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """x[m, k] = code[m, k] * ascales[m, k / 64]"""
    unsigned = _unsigned_groups(codes.shape[-1], act_unsigned, codes.device)
    nibbles = by_group(codes, GROUP_SIZE)
    values = torch.where(unsigned, nibbles.float(), sign_extend(nibbles).float())
    return (values * ascales.float()[..., None]).flatten(-2)


FORMAT = Format(
    "int4",
    GROUP_SIZE,
    True,
    weight_parts,
    encode_weight,
    decode_weight,
    quantize_activation,
    decode_activation,
    ("absmax", "signed_extreme"),
)
