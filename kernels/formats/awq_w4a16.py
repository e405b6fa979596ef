"""AWQ W4A16: unsigned 4-bit weights with scale and zero per 64 input channels; activations stay in 16 bit.

W[n, k] = (code[n, k] - 8) * wscales[k / 64, n] + wzeros[k / 64, n]. No smoothing, no low-rank branch. Used for the
modulation (adaLN) layers, which see one row per image and are bound by memory.
Source: the `awq_w4a16` layers of ComfyUI and comfy-kitchen.
"""

import torch

from ..packing import pack, unpack
from . import SIXTEEN_BIT, Format, Part, Tensors, by_group

GROUP_SIZE = 64


def weight_parts(n: int, k: int) -> dict[str, Part]:
    return {
        "qweight": Part((n, k // 2), (torch.int8,)),
        "wscales": Part((k // GROUP_SIZE, n), SIXTEEN_BIT),
        "wzeros": Part((k // GROUP_SIZE, n), SIXTEEN_BIT),
    }


def encode_weight(weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """code = round((w - wzeros) / scale) + 8 of a group, scale = (max - min) / 15, wzeros = min + 8 scale"""
    groups = by_group(weight.float(), GROUP_SIZE)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).to(dtype)
    zeros = (low + 8 * scales.float()).to(dtype)
    divisor = torch.where(scales == 0, 1, scales.float())
    codes = ((groups - zeros.float()[..., None]) / divisor[..., None]).round().add(8).clamp(0, 15)
    return {
        "qweight": pack(codes.flatten(-2).to(torch.uint8)),
        "wscales": scales.T.contiguous(),
        "wzeros": zeros.T.contiguous(),
    }


def decode_weight(tensors: Tensors) -> torch.Tensor:
    """W[n, k] = (code - 8) * wscales[k / 64, n] + wzeros[k / 64, n]"""
    codes = by_group(unpack(tensors["qweight"]).float() - 8, GROUP_SIZE)
    scales, zeros = (tensors[name].T.float()[..., None] for name in ("wscales", "wzeros"))
    return (codes * scales + zeros).flatten(-2)


FORMAT = Format("awq_w4a16", GROUP_SIZE, False, weight_parts, encode_weight, decode_weight)
