"""Round to a 4-bit grid: weights with scales that minimize the squared error, activations by the kernels' rule.

Nothing here is packed. Values stay in float32 but lie exactly on the grid that the stored tensors mean, so that an
error measured here is the error of the file. What a grid is, its format says.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ...kernels.formats import Format, by_group
from ...kernels.layer import LayerSpec
from ...kernels.packing import pack
from ...kernels.roundtrip import rounded

CHUNK = 1 << 18  # elements worked on at once: they stay in the processor's cache


@dataclass(frozen=True)
class WeightScales:
    """What one code step of each weight group means.

    step    (N, K/group) float32, exactly as the stored scales multiply; negative steps are legal for int4
    stored  the scale tensors of the checkpoint
    every_code  whether values are rounded to every code, or to those alone that `encode_weight` uses
    """

    fmt: Format
    step: torch.Tensor
    stored: Mapping[str, torch.Tensor]
    every_code: bool

    def nearest(self, values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The grid point next to each value; `step` broadcasts against `values`."""
        return self.fmt.nearest(values, step, self.every_code)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Every element of (N, K) on its own, round to nearest."""
        groups = weight.unflatten(-1, (self.step.shape[1], -1))
        return self.nearest(groups, self.step[..., None]).flatten(-2)

    def encode(self, rounded: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of an (N, K) matrix whose elements lie on this grid."""
        groups = rounded.unflatten(-1, (self.step.shape[1], -1))
        divisor = torch.where(self.step == 0, 1, self.step)[..., None]
        codes = self.fmt.codes_of(groups / divisor)
        return {"qweight": pack(codes.flatten(-2)), **self.stored}


def absmax_scales(weight: torch.Tensor, fmt: Format, dtype: torch.dtype) -> WeightScales:
    """step = absmax of the group / largest code, as the format's own `encode_weight` has it; weight (N, K) float32"""
    absmax = by_group(weight, fmt.group_size).abs().amax(-1)
    step, stored = fmt.store_step(fmt.absmax_step(absmax), fmt.upper_scale(absmax, searching=False), dtype)
    return WeightScales(fmt, step, stored, every_code=False)


def searched_scales(
    weight: torch.Tensor, fmt: Format, dtype: torch.dtype, importance: torch.Tensor | None = None
) -> WeightScales:
    """step = argmin over the format's candidates of sum_k importance[k] * (weight[n, k] - grid(weight[n, k], step))^2

    weight (N, K) float32; importance (K,), the mean squared activation, or None for all alike
    """
    n, k = weight.shape
    share = torch.ones(k, device=weight.device) if importance is None else importance.to(weight).clamp_min(1e-30)
    share = (share / share.mean()).unflatten(0, (-1, fmt.group_size))
    absmax = by_group(weight, fmt.group_size).abs().amax(-1)
    upper = fmt.upper_scale(absmax, searching=True)
    best = torch.empty_like(absmax)
    rows = max(1, CHUNK // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        candidates = fmt.candidates(absmax[part], upper, dtype)
        best[part] = _best_step(by_group(weight[part], fmt.group_size), candidates, share, fmt)
    step, stored = fmt.store_step(best, upper, dtype)
    return WeightScales(fmt, step, stored, every_code=True)


def _best_step(
    groups: torch.Tensor, candidates: Iterable[torch.Tensor], share: torch.Tensor, fmt: Format
) -> torch.Tensor:
    """The best step of each group of some rows, exactly as it will be stored."""
    best = least = None
    for step in candidates:
        error = (fmt.nearest(groups, step[..., None]).sub_(groups).square_() * share).sum(-1)
        if best is None or least is None:
            best, least = step, error
            continue
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    if best is None:
        raise ValueError(f"{fmt.name} names no candidate for the scale of a group")
    return best


def round_activation(z: torch.Tensor, spec: LayerSpec, centre: torch.Tensor | None = None) -> torch.Tensor:
    """What the kernels make of a smoothed, shifted activation (M, K) float32, by the layer's rule, decoded again.

    centre  (K,) act_mean / smooth_factor: taken off before the rounding and added after it
    """
    if spec.act_bits == 8:
        return _round_int8(z, spec)
    return rounded(z, spec) if centre is None else rounded(z - centre, spec).add_(centre)


def _round_int8(z: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """By groups (w4a8), or by rows where the format has no such mode (w4a8-jit)"""
    groups = by_group(z, spec.fmt.act8_group or spec.k)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (groups / torch.where(scale == 0, 1, scale)).round_().mul_(scale).flatten(-2)
