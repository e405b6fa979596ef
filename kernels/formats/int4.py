"""INT4: two's-complement codes, one scale per 64 input channels.

A nibble can hold -8..7. Weights and signed activations are emitted in -7..7 with scale = absmax / 7 (a recipe may use
-8 as well); readers decode all sixteen codes. Inputs that come out of a GELU are shifted up by GELU_SHIFT, so that
they are never negative, and use the unsigned codes 0..15 with scale = max / 15.

Rounding (activations): the scale is computed in fp32 and stored in the dtype of x; codes are rounded to nearest even
from x * (1 / scale) with the *unstored* fp32 scale, then saturated. The rule `signed_extreme` uses all sixteen codes
of signed groups: scale = -(element of largest magnitude) / 8, so that this element is code -8 whatever its sign.
Source: SVDQuant, arXiv 2411.05007; the rule of the Nunchaku kernels. Layout: quantize/files/dialects/native.py.
"""

from collections.abc import Iterable

import torch

from ..modes import FEW, SOME, W16, Mode
from ..packing import pack, sign_extend, unpack
from . import (
    GROUP_SIZE,
    SIXTEEN_BIT,
    STOCK_RULE,
    TWOS_COMPLEMENT,
    Format,
    Tensors,
    TensorSpec,
    all_finite,
    by_group,
)

SIGNED_EXTREME = "signed_extreme"
SHRINKS = 12  # candidates per sign for a weight scale, evenly from SMALLEST_SHRINK to 1 of absmax / 7
SMALLEST_SHRINK = 0.62


class Int4(Format):
    name = "int4"
    group_size = GROUP_SIZE
    code = TWOS_COMPLEMENT
    unsigned_act = True
    act_rules = (STOCK_RULE, SIGNED_EXTREME)
    act8_group = GROUP_SIZE
    units = {torch.int8: 15, torch.float8_e4m3fn: 32}  # noqa: RUF012 (typed in the base class)
    computes = ("w4a4", "w4a8", "w8a8", "w4a8-jit", "fp8", "w16")
    modes = (
        Mode("cpu", "w8a8"),
        Mode("cpu", "w4a4"),
        Mode("cpu", "w4a8"),
        Mode("sm_75", "w4a4"),
        # an A100's int8 path is limited by the rescaling of groups, which expanded rows do not need
        Mode("sm_80", "w4a8", SOME),
        Mode("sm_80", "w4a8-jit"),
        Mode("sm_8", "w4a4"),
        Mode("sm_8", "w4a8"),
        Mode("sm_90", "w4a8", FEW),
        Mode("sm_90", "w4a8-jit"),
        Mode("sm_90", "fp8"),
        # int4 is emulated from sm_90 on, and int8 on sm_100 runs at a fraction of fp8
        Mode("sm_10", "w4a8", FEW),
        Mode("sm_10", "fp8"),
        Mode("sm_10", "w4a8-jit"),
        Mode("sm_1", "w4a8"),  # sm_11, sm_12 and what is newer than this pack
        Mode("sm_1", "w4a8-jit"),
        Mode("gfx", "w4a8"),
        Mode("gfx", "w4a8-jit"),
        W16,
    )
    spellings = {  # noqa: RUF012
        "native": ("svdquant_w4a4",),
        "kitchen": ("svdquant_w4a4",),
        "nunchaku": ("int4",),
        "nunchaku lite": ("int4",),
        "published": ("int4",),
    }

    def weight_parts(self, n: int, k: int) -> dict[str, TensorSpec]:
        return {
            "qweight": TensorSpec((n, k // 2), (torch.int8,)),
            "wscales": TensorSpec((k // self.group_size, n), SIXTEEN_BIT),
        }

    def encode_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """code = round(w / scale), scale = absmax of the group / 7, rounded to `dtype` first: decoding is exact

        >>> stored = FORMAT.encode_weight(torch.linspace(-7, 7, 64)[None], torch.bfloat16)
        >>> stored["wscales"]
        tensor([[1.]], dtype=torch.bfloat16)
        >>> FORMAT.decode_weight(stored)[0, :8]
        tensor([-7., -7., -7., -6., -6., -6., -6., -5.])
        """
        groups = by_group(weight.float(), self.group_size)  # (N, K/64, 64)
        scales = (groups.abs().amax(-1) / 7).to(dtype)
        divisor = torch.where(scales == 0, 1, scales.float())
        codes = (groups / divisor[..., None]).round().clamp(-7, 7)
        return {"qweight": pack(codes.flatten(-2).to(torch.int8)), "wscales": scales.T.contiguous()}

    def decode_weight(self, tensors: Tensors) -> torch.Tensor:
        """W[n, k] = code[n, k] * wscales[k / 64, n]"""
        codes = by_group(sign_extend(unpack(tensors["qweight"])).float(), self.group_size)
        return (codes * tensors["wscales"].T.float()[..., None]).flatten(-2)

    def code_values(self, nibbles: torch.Tensor) -> torch.Tensor:
        return sign_extend(nibbles).float()

    def absmax_step(self, absmax: torch.Tensor) -> torch.Tensor:
        """absmax / 7"""
        return absmax / 7

    def candidates(
        self, absmax: torch.Tensor, upper: torch.Tensor | None, dtype: torch.dtype
    ) -> Iterable[torch.Tensor]:
        """12 shrinks of absmax / 7, each with both signs: the nibble reaches -8 on one side only, and a negative step

        turns that side to where the group's extreme lies.
        """
        for shrink in torch.linspace(SMALLEST_SHRINK, 1.0, SHRINKS).tolist():
            for sign in (1, -1):
                yield (sign * shrink * absmax / 7).to(dtype).float()

    def nearest(self, values: torch.Tensor, step: torch.Tensor, every_code: bool = True) -> torch.Tensor:
        lowest = -8 if every_code else -7
        return (values / torch.where(step == 0, 1, step)).round_().clamp_(lowest, 7).mul_(step)

    def codes_of(self, multiples: torch.Tensor) -> torch.Tensor:
        return multiples.round().to(torch.int8)

    def quantize_activation(
        self, x: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0), rule: str = STOCK_RULE
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """code = round(x / scale) to nibbles; scale = absmax / 7, or max / 15 for channels in the range `act_unsigned`

        x        (M, K) already smoothed (and shifted where unsigned)
        rule     absmax, or signed_extreme: scale = -extreme / 8 in signed groups
        returns  nibbles (M, K) uint8, ascales (M, K/64) in the dtype of x. NaN and Inf make their group's scale NaN.

            >>> x = torch.full((1, 64), -3.5)
            >>> nibbles, ascales = FORMAT.quantize_activation(x)
            >>> nibbles[0, 0].item(), ascales.item()  # -7 in two's complement
            (9, 0.5)
            >>> torch.equal(FORMAT.decode_activation(nibbles, ascales), x)
            True
        """
        groups = by_group(x.float(), self.group_size)  # (M, K/64, 64)
        unsigned = self._unsigned_groups(x.shape[-1], act_unsigned, x.device)
        extreme = torch.where(unsigned, groups, groups.abs()).amax(-1, keepdim=True).clamp_min(0)
        extreme = torch.where(extreme.isfinite(), extreme, torch.nan)
        scales = extreme / torch.where(unsigned, 15.0, 7.0)
        if rule == SIGNED_EXTREME:
            largest = groups.amax(-1, keepdim=True)
            signed = torch.where(largest >= extreme, -extreme, extreme) / 8  # NaN compares false and stays NaN
            scales = torch.where(unsigned, scales, signed)
        reciprocal = torch.where(scales == 0, 0.0, 1 / scales)
        codes = torch.nan_to_num(groups * reciprocal).round()
        codes = torch.where(unsigned, codes.clamp(0, 15), codes.clamp(-8, 7))
        return (codes.flatten(-2).to(torch.int16) & 15).to(torch.uint8), scales[..., 0].to(x.dtype)

    def decode_activation(
        self, codes: torch.Tensor, ascales: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0)
    ) -> torch.Tensor:
        """x[m, k] = code[m, k] * ascales[m, k / 64]"""
        unsigned = self._unsigned_groups(codes.shape[-1], act_unsigned, codes.device)
        nibbles = by_group(codes, self.group_size)
        values = torch.where(unsigned, nibbles.float(), sign_extend(nibbles).float())
        return (values * ascales.float()[..., None]).flatten(-2)

    def _unsigned_groups(self, k: int, act_unsigned: tuple[int, int], device: torch.device) -> torch.Tensor:
        """(K/64, 1) bool: the groups inside the unsigned channel range."""
        start, stop = act_unsigned
        first = torch.arange(0, k, self.group_size, device=device)
        return ((first >= start) & (first < stop))[:, None]

    def round_activation(self, x: torch.Tensor, act_unsigned: tuple[int, int], rule: str) -> torch.Tensor:
        """Signed and unsigned channels, each in one stretch, without codes in between"""
        start, stop = act_unsigned
        ends = (0, start, stop, x.shape[1]) if start != stop else (0, 0, 0, x.shape[1])
        parts = []
        for first, last, unsigned in zip(ends, ends[1:], (False, True, False), strict=False):
            if first != last:
                part = self._round_stretch(x[:, first:last], unsigned, rule)
                if part is None:  # NaN, Inf, or a scale so small that its reciprocal overflows
                    return super().round_activation(x, act_unsigned, rule)
                parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _round_stretch(self, x: torch.Tensor, unsigned: bool, rule: str) -> torch.Tensor | None:
        groups = by_group(x.float(), self.group_size)
        extreme = (groups if unsigned else groups.abs()).amax(-1, keepdim=True)
        if unsigned:
            extreme = extreme.clamp_min_(0)
        top = torch.full_like(extreme, 15.0 if unsigned else 7.0)  # a tensor: torch divides by a number in another way
        scales = extreme / top
        if not unsigned and rule == SIGNED_EXTREME:
            scales = torch.where(groups.amax(-1, keepdim=True) >= extreme, -extreme, extreme) / 8
        reciprocal = torch.where(scales == 0, 0.0, 1 / scales)
        if not all_finite(reciprocal, extreme):
            return None
        codes = (groups * reciprocal).round_()
        if unsigned:
            codes.clamp_(0, 15)
        elif rule == SIGNED_EXTREME:
            codes.clamp_(max=7)
        return codes.mul_(scales.to(x.dtype).float()).flatten(-2)


FORMAT = Int4()
