"""NVFP4: E2M1 codes, one E4M3 scale per 16 input channels, one scale per tensor or per output channel above them.

Weights: W[n, k] = e2m1(code) * e4m3(wscales[k / 16, n]) * wtscale * wcscales[n]. Activations have no upper scale:
scale = min(absmax / 6, 448) stored as E4M3, and codes are rounded to nearest even from x times the reciprocal of the
*unstored* fp32 scale. The rule `four_six` also tries scale = min(absmax / 4, 448) and keeps, group by group, the one
with the smaller squared error (Four Over Six, arXiv 2512.02010).

So w4a4 has a range, unlike int4: a group of 16 smoothed activations whose absmax is from 0.094 to 2688 (6 * 2**-6 to
6 * 448) is rounded alike at every power of two. Above, values are cut to 2688. Below, the scale loses a bit with every
halving, and from 0.006 on the group is zero. The low-rank branch and the modes other than w4a4 have no such range.
Source: NVIDIA NVFP4; the rule of the Nunchaku kernels.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch

from ..modes import W16, Mode
from ..packing import pack, unpack
from . import E2M1_CODE, SIXTEEN_BIT, STOCK_RULE, Format, Tensors, TensorSpec, all_finite, by_group

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitude of codes 0..7; bit 3 is the sign
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_LEAST = 2.0**-6  # with all bits
FOUR_SIX = "four_six"
# of absmax / 6: as it is, 4/6 (absmax becomes the code 4), and what E4M3 offers near both
SEARCHED_FACTORS = (1.0, 1.5, 0.8, 0.86, 0.93, 1.08, 1.17, 1.27, 1.38, 1.62)
SEARCH_TOP = 256.0  # largest E4M3 group scale before a search: scales up to 1.62 times larger still fit


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


class Nvfp4(Format):
    name = "nvfp4"
    group_size = 16
    code = E2M1_CODE
    act_rules = (STOCK_RULE, FOUR_SIX)
    act_range = (E2M1_MAX * E4M3_LEAST, E2M1_MAX * E4M3_MAX)
    units = {torch.int8: 20, torch.float8_e4m3fn: 64}  # noqa: RUF012 (typed in the base class)
    by_column = {"wscales": 4}  # noqa: RUF012
    computes = ("w4a4", "w8a8", "w4a8-jit", "fp8", "w16")
    modes = (
        Mode("cpu", "w8a8"),
        Mode("cpu", "w4a4"),
        Mode("cpu", "w4a8-jit"),
        Mode("sm_10", "w4a4"),
        Mode("sm_12", "w4a4"),
        Mode("sm_10", "fp8"),
        Mode("sm_8", "w4a8-jit"),
        Mode("sm_90", "w4a8-jit"),
        Mode("sm_1", "w4a8-jit"),  # sm_11 and what is newer than this pack as well
        Mode("gfx", "w4a8-jit"),
        W16,
    )
    spellings = {  # noqa: RUF012
        "native": ("svdquant_nvfp4",),
        "nunchaku": ("fp4_e2m1_all", "fp4"),
        "nunchaku lite": ("nvfp4",),
        "published": ("fp4",),
    }

    def weight_parts(self, n: int, k: int) -> dict[str, TensorSpec]:
        return {
            "qweight": TensorSpec((n, k // 2), (torch.int8,)),
            "wscales": TensorSpec((k // self.group_size, n), (torch.float8_e4m3fn,)),
            "wtscale": TensorSpec((), SIXTEEN_BIT, optional=True),
            "wcscales": TensorSpec((n,), SIXTEEN_BIT, optional=True),
        }

    def encode_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """code = e2m1(w / (scale * wtscale)); wtscale = absmax / (6 * 448): group scales use E4M3's full range

        `dtype` is not used: the group scales are E4M3 and the tensor scale stays in fp32.

            >>> weight = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).repeat(1, 2)
            >>> stored = FORMAT.encode_weight(weight, torch.bfloat16)
            >>> stored["wscales"].float() * stored["wtscale"]
            tensor([[1.]])
            >>> torch.equal(FORMAT.decode_weight(stored), weight)
            True
        """
        groups = by_group(weight.float(), self.group_size)  # (N, K/16, 16)
        group_max = groups.abs().amax(-1)
        wtscale = group_max.amax() / (E2M1_MAX * E4M3_MAX)
        wtscale = torch.where(wtscale == 0, 1, wtscale)
        scales = (group_max / E2M1_MAX / wtscale).clamp_max(E4M3_MAX).to(torch.float8_e4m3fn)
        divisor = scales.float() * wtscale
        codes = to_e2m1(groups / torch.where(divisor == 0, 1, divisor)[..., None])
        codes = torch.where((divisor == 0)[..., None], 0, codes)
        return {"qweight": pack(codes.flatten(-2)), "wscales": scales.T.contiguous(), "wtscale": wtscale}

    def decode_weight(self, tensors: Tensors) -> torch.Tensor:
        """W[n, k] = e2m1(code) * wscales[k / 16, n] * wtscale * wcscales[n]"""
        values = by_group(from_e2m1(unpack(tensors["qweight"])), self.group_size)
        scales = tensors["wscales"].float().T
        if "wtscale" in tensors:
            scales = scales * tensors["wtscale"].float()
        if "wcscales" in tensors:
            scales = scales * tensors["wcscales"].float()[:, None]
        return (values * scales[..., None]).flatten(-2)

    def code_values(self, nibbles: torch.Tensor) -> torch.Tensor:
        return from_e2m1(nibbles)

    def absmax_step(self, absmax: torch.Tensor) -> torch.Tensor:
        """absmax / 6"""
        return absmax / E2M1_MAX

    def upper_scale(self, absmax: torch.Tensor, searching: bool) -> torch.Tensor:
        """wtscale such that the largest group's absmax / 6 is stored as 448, or as 256 before a search

        Up to the next number that bf16 has: files of others hold it so, and what it is rounded to is then what it is.
        """
        scale = absmax.amax() / (E2M1_MAX * (SEARCH_TOP if searching else E4M3_MAX))
        return torch.where(scale == 0, 1, (scale * (1 + 2**-8)).to(torch.bfloat16).float())

    def candidates(
        self, absmax: torch.Tensor, upper: torch.Tensor | None, dtype: torch.dtype
    ) -> Iterable[torch.Tensor]:
        """10 factors of absmax / 6, among them 4/6, each rounded to E4M3"""
        assert upper is not None  # upper_scale of this format always gives one
        for factor in SEARCHED_FACTORS:
            yield self._e4m3(absmax / E2M1_MAX * factor, upper).float() * upper

    def store_step(
        self, step: torch.Tensor, upper: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert upper is not None
        stored = self._e4m3(step, upper)
        return stored.float() * upper, {"wscales": stored.T.contiguous(), "wtscale": upper}

    @staticmethod
    def _e4m3(step: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        return (step / upper).clamp_max(E4M3_MAX).to(torch.float8_e4m3fn)

    def nearest(self, values: torch.Tensor, step: torch.Tensor, every_code: bool = True) -> torch.Tensor:
        """E2M1 is piecewise even: steps of 0.5 below 2, of 1 below 4, of 2 above; ties go to even in each"""
        scaled = values / torch.where(step == 0, 1, step)
        magnitude = scaled.abs().clamp_(max=E2M1_MAX)
        # 1 below 2, 2 in [2, 4), 4 above: the exponent that the code's two-bit field would have
        span = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
        return magnitude.div_(span).round_().mul_(span).copysign_(scaled).mul_(step)

    def codes_of(self, multiples: torch.Tensor) -> torch.Tensor:
        middles = torch.tensor([(low + high) / 2 for low, high in pairwise(E2M1)], device=multiples.device)
        return (torch.bucketize(multiples.abs(), middles) | (multiples < 0).to(torch.int64) << 3).to(torch.uint8)

    def quantize_activation(
        self, x: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0), rule: str = STOCK_RULE
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """code = e2m1(x / scale); scale = min(absmax of 16 channels / 6, 448), stored as E4M3

        x        (M, K) already smoothed; act_unsigned must be empty, E2M1 has a sign bit
        rule     absmax, or four_six: absmax / 4 where that is nearer
        returns  nibbles (M, K) uint8, ascales (M, K/16) float8_e4m3fn. NaN and Inf make their group's scale NaN.
        """
        groups = by_group(x.float(), self.group_size)
        absmax = groups.abs().amax(-1, keepdim=True)
        absmax = torch.where(absmax.isfinite(), absmax, torch.nan)
        codes, scales = _codes_at(groups, absmax, E2M1_MAX)
        if rule == FOUR_SIX:
            other_codes, other_scales = _codes_at(groups, absmax, 4.0)
            error, other_error = (
                (from_e2m1(found) * stored.float() - groups).square().sum(-1, keepdim=True)
                for found, stored in ((codes, scales), (other_codes, other_scales))
            )
            better = other_error < error
            codes = torch.where(better, other_codes, codes)
            scales = torch.where(better, other_scales.float(), scales.float()).to(torch.float8_e4m3fn)
        return codes.flatten(-2), scales[..., 0]

    def decode_activation(
        self, codes: torch.Tensor, ascales: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0)
    ) -> torch.Tensor:
        """x[m, k] = e2m1(code[m, k]) * ascales[m, k / 16]"""
        return (by_group(from_e2m1(codes), self.group_size) * ascales.float()[..., None]).flatten(-2)

    def round_activation(self, x: torch.Tensor, act_unsigned: tuple[int, int], rule: str) -> torch.Tensor:
        """Nearest E2M1 value: the step between values is half of the power of two below |v|, at least 1/2"""
        groups = by_group(x.float(), self.group_size)
        extreme = groups.abs().amax(-1, keepdim=True)
        scales = (extreme / E2M1_MAX).clamp_max(E4M3_MAX)
        reciprocal = torch.where(scales == 0, 0.0, 1 / scales)
        if rule != STOCK_RULE or not all_finite(reciprocal, extreme):
            return super().round_activation(x, act_unsigned, rule)
        values = (groups * reciprocal).clamp_(-E2M1_MAX, E2M1_MAX)
        power = values.abs().clamp_(min=1).view(torch.int32).bitwise_and_(0x7F800000)
        step = power.sub_(1 << 23).view(torch.float32)  # one less in the exponent: half
        codes = values.div_(step).round_().mul_(step)
        return codes.mul_(scales.to(torch.float8_e4m3fn).float()).flatten(-2)

    def rounding_noise(self, groups: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Of steps of 1/12 of the group's extreme m below m / 3, of 1/6 below 2 m / 3, and of 1/3 above"""
        extreme = groups.amax(-1, keepdim=True)
        with torch.no_grad():  # which step an element falls into jumps; only the extreme has a slope
            widths = (
                1 + 3 * (groups > extreme / 3).to(groups.dtype) + 12 * (groups > extreme * (2 / 3)).to(groups.dtype)
            )
        return (extreme.square() * widths).sum(0) / (12 * 144)


def _codes_at(groups: torch.Tensor, absmax: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, E4M3 scales) with scale = min(absmax / top, 448)"""
    scales = (absmax / top).clamp_max(E4M3_MAX)
    codes = to_e2m1(groups * torch.where(scales == 0, 0.0, 1 / scales))
    return codes, scales.to(torch.float8_e4m3fn)


FORMAT = Nvfp4()
