"""Round to a 4-bit grid: weights with scales that minimize the squared error, activations by the kernels' rule.

Nothing here is packed. Values stay in float32 but lie exactly on the grid that the stored tensors mean, so that an
error measured here is the error of the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from ...kernels.formats import by_group
from ...kernels.formats.int4 import GROUP_SIZE as INT4_GROUP
from ...kernels.formats.nvfp4 import E2M1, E2M1_MAX, E4M3_MAX
from ...kernels.layer import LayerSpec
from ...kernels.packing import pack
from ...kernels.roundtrip import rounded

SHRINKS = 12  # candidates per sign for an int4 scale, evenly from SMALLEST_SHRINK to 1 of absmax / 7
SMALLEST_SHRINK = 0.62
# of absmax / 6: as it is, 4/6 (absmax becomes the code 4), and what E4M3 offers near both
E4M3_FACTORS = (1.0, 1.5, 0.8, 0.86, 0.93, 1.08, 1.17, 1.27, 1.38, 1.62)
SEARCH_TOP = 256.0  # largest E4M3 group scale before a search: scales up to 1.62 times larger still fit
CHUNK = 1 << 18  # elements worked on at once: they stay in the processor's cache


@dataclass(frozen=True)
class WeightScales:
    """What one code step of each weight group means.

    format  int4 or nvfp4
    step    (N, K/group) float32, exactly as the stored scales multiply; negative steps are legal for int4
    lowest  the smallest int4 code in use, -7 or -8
    stored  the scale tensors of the checkpoint
    """

    format: str
    step: torch.Tensor
    lowest: int
    stored: Mapping[str, torch.Tensor]

    def nearest(self, values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The grid point next to each value; `step` broadcasts against `values`."""
        if self.format == "int4":
            return _nearest_int4(values, step, self.lowest)
        return _nearest_e2m1(values, step)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Every element of (N, K) on its own, round to nearest."""
        groups = weight.unflatten(-1, (self.step.shape[1], -1))
        return self.nearest(groups, self.step[..., None]).flatten(-2)

    def encode(self, rounded: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of an (N, K) matrix whose elements lie on this grid."""
        groups = rounded.unflatten(-1, (self.step.shape[1], -1))
        divisor = torch.where(self.step == 0, 1, self.step)[..., None]
        scaled = groups / divisor
        codes = scaled.round().to(torch.int8) if self.format == "int4" else _e2m1_codes(scaled)
        return {"qweight": pack(codes.flatten(-2)), **self.stored}


def absmax_scales(weight: torch.Tensor, format: str, dtype: torch.dtype) -> WeightScales:
    """step = absmax of the group / 7 (int4) or / 6 (nvfp4), as the formats' own `encode_weight` has it"""
    if format == "int4":
        step = (by_group(weight, INT4_GROUP).abs().amax(-1) / 7).to(dtype)
        return WeightScales(format, step.float(), -7, {"wscales": step.T.contiguous()})
    absmax = by_group(weight, 16).abs().amax(-1)
    return _nvfp4_scales(absmax / E2M1_MAX, _tensor_scale(absmax, E4M3_MAX))


def searched_scales(
    weight: torch.Tensor, format: str, dtype: torch.dtype, importance: torch.Tensor | None = None
) -> WeightScales:
    """step = argmin over candidates of sum_k importance[k] * (weight[n, k] - grid(weight[n, k], step))^2

    int4   12 shrinks of absmax / 7, each with both signs: the nibble reaches -8 on one side only, and a negative step
           turns that side to where the group's extreme lies
    nvfp4  10 factors of absmax / 6, among them 4/6, each rounded to E4M3
    weight (N, K) float32; importance (K,), the mean squared activation, or None for all alike
    """
    n, k = weight.shape
    group = INT4_GROUP if format == "int4" else 16
    share = torch.ones(k, device=weight.device) if importance is None else importance.to(weight).clamp_min(1e-30)
    share = (share / share.mean()).unflatten(0, (-1, group))
    absmax = by_group(weight, group).abs().amax(-1)
    tensor_scale = _tensor_scale(absmax, SEARCH_TOP) if format == "nvfp4" else None
    best = torch.empty_like(absmax)
    rows = max(1, CHUNK // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        best[part] = _search_rows(by_group(weight[part], group), absmax[part], share, format, dtype, tensor_scale)
    if format == "int4":
        return WeightScales(format, best, -8, {"wscales": best.to(dtype).T.contiguous()})
    return _nvfp4_scales(best, tensor_scale)


def _search_rows(
    groups: torch.Tensor,
    absmax: torch.Tensor,
    share: torch.Tensor,
    format: str,
    dtype: torch.dtype,
    tensor_scale: torch.Tensor | None,
) -> torch.Tensor:
    """The best step of each group of some rows, exactly as it will be stored."""
    if format == "int4":
        shrinks = torch.linspace(SMALLEST_SHRINK, 1.0, SHRINKS).tolist()
        candidates = [(sign * shrink * absmax / 7).to(dtype).float() for shrink in shrinks for sign in (1, -1)]
    else:
        candidates = [_e4m3(absmax / E2M1_MAX * factor, tensor_scale) for factor in E4M3_FACTORS]
    best, least = candidates[0], None
    for step in candidates:
        wide = step[..., None]
        near = _nearest_int4(groups, wide, -8) if format == "int4" else _nearest_e2m1(groups, wide)
        error = (near.sub_(groups).square_() * share).sum(-1)
        if least is None:
            least = error
            continue
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


def _tensor_scale(absmax: torch.Tensor, top: float) -> torch.Tensor:
    """wtscale such that the largest group's absmax / 6 is stored as the E4M3 number `top`."""
    scale = absmax.amax() / (E2M1_MAX * top)
    return torch.where(scale == 0, 1, scale)


def _e4m3(step: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    stored = (step / tensor_scale).clamp_max(E4M3_MAX).to(torch.float8_e4m3fn)
    return stored.float() * tensor_scale


def _nvfp4_scales(step: torch.Tensor, tensor_scale: torch.Tensor) -> WeightScales:
    stored = (step / tensor_scale).clamp_max(E4M3_MAX).to(torch.float8_e4m3fn)
    tensors = {"wscales": stored.T.contiguous(), "wtscale": tensor_scale}
    return WeightScales("nvfp4", stored.float() * tensor_scale, -7, tensors)


def _nearest_int4(values: torch.Tensor, step: torch.Tensor, lowest: int) -> torch.Tensor:
    return (values / torch.where(step == 0, 1, step)).round_().clamp_(lowest, 7).mul_(step)


def _nearest_e2m1(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """E2M1 is piecewise even: steps of 0.5 below 2, of 1 below 4, of 2 above; half to even in each is its tie rule."""
    scaled = values / torch.where(step == 0, 1, step)
    magnitude = scaled.abs().clamp_(max=E2M1_MAX)
    # 1 below 2, 2 in [2, 4), 4 above: the exponent that the code's two-bit field would have
    span = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return magnitude.div_(span).round_().mul_(span).copysign_(scaled).mul_(step)


def _e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """Codes of values that are E2M1 numbers up to float error."""
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(E2M1)], device=values.device)
    return (torch.bucketize(values.abs(), middles) | (values < 0).to(torch.int64) << 3).to(torch.uint8)


def round_activation(z: torch.Tensor, spec: LayerSpec, centre: torch.Tensor | None = None) -> torch.Tensor:
    """What the kernels make of a smoothed, shifted activation (M, K) float32, by the layer's rule, decoded again.

    centre  (K,) act_mean / smooth_factor: taken off before the rounding and added after it
    """
    if spec.act_bits == 8:
        return _round_int8(z, spec)
    return rounded(z, spec) if centre is None else rounded(z - centre, spec).add_(centre)


def _round_int8(z: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """By groups of 64 (w4a8), or by rows where the format has no such mode (w4a8-jit)"""
    groups = by_group(z, INT4_GROUP if spec.format == "int4" else spec.k)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (groups / torch.where(scale == 0, 1, scale)).round_().mul_(scale).flatten(-2)
