"""AWQ W4A16: unsigned 4-bit weights with scale and zero per 64 input channels; activations stay in 16 bit.

W[n, k] = (code[n, k] - 8) * wscales[k / 64, n] + wzeros[k / 64, n]. No smoothing, no low-rank branch. Used for the
modulation (adaLN) layers, which see one row per image and are bound by memory.
Source: the `awq_w4a16` layers of ComfyUI and comfy-kitchen.
"""

import torch

from ..modes import FEW, W16, Mode
from ..packing import pack, unpack
from . import GROUP_SIZE, OFFSET_8, SIXTEEN_BIT, Format, Tensors, TensorSpec, by_group


class AwqW4A16(Format):
    name = "awq_w4a16"
    group_size = GROUP_SIZE
    code = OFFSET_8
    low_rank = False
    computes = ("w4a16", "w16")
    modes = (Mode("", "w4a16", FEW), W16)
    spellings = {  # noqa: RUF012 (typed in the base class)
        "native": ("awq_w4a16",),
        "kitchen": ("awq_w4a16",),
        "nunchaku": ("awq_w4a16",),
        "nunchaku lite": ("int4",),
    }

    def weight_parts(self, n: int, k: int) -> dict[str, TensorSpec]:
        return {
            "qweight": TensorSpec((n, k // 2), (torch.int8,)),
            "wscales": TensorSpec((k // self.group_size, n), SIXTEEN_BIT),
            "wzeros": TensorSpec((k // self.group_size, n), SIXTEEN_BIT),
        }

    def encode_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """code = round((w - wzeros) / scale) + 8 of a group, scale = (max - min) / 15, wzeros = min + 8 scale

        >>> weight = torch.arange(16.0).repeat(1, 4)  # 0..15: every code once in each sixteen
        >>> stored = FORMAT.encode_weight(weight, torch.bfloat16)
        >>> stored["wscales"].item(), stored["wzeros"].item()
        (1.0, 8.0)
        >>> torch.equal(FORMAT.decode_weight(stored), weight)
        True
        """
        groups = by_group(weight.float(), self.group_size)
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

    def decode_weight(self, tensors: Tensors) -> torch.Tensor:
        """W[n, k] = (code - 8) * wscales[k / 64, n] + wzeros[k / 64, n]"""
        codes = by_group(unpack(tensors["qweight"]).float() - 8, self.group_size)
        scales, zeros = (tensors[name].T.float()[..., None] for name in ("wscales", "wzeros"))
        return (codes * scales + zeros).flatten(-2)

    def code_values(self, nibbles: torch.Tensor) -> torch.Tensor:
        return nibbles.float() - 8


FORMAT = AwqW4A16()
