"""Round a weight to its 4-bit grid: scales of least squared error, each element to nearest or by GPTQ.

GPTQ rounds column by column and lets the columns that follow make up for the error: arXiv 2210.17323, with static
group scales and activation order. Nothing here is packed: values stay in float32 but lie exactly on the grid that the
stored tensors mean, so that an error measured here is the error of the file. What a grid is, its format says.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ...kernels.formats import Format
from ...kernels.layer import LayerSpec
from ...kernels.packing import pack
from .inputs import MOST_DAMPINGS, Gram, cholesky
from .rows import rows_of

CHUNK = 1 << 18  # elements worked on at once: they stay in the processor's cache
DAMPING = 0.01  # of the mean diagonal, added to it
ALIKE = 64  # dampings of the same size, before they rise
BLOCK = 128  # columns between two updates of everything that follows


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

    def rows(self, rows: slice) -> "WeightScales":
        """Of some rows of the matrix."""
        n, groups = self.step.shape
        spec = LayerSpec(self.fmt.name, n, groups * self.fmt.group_size)
        return replace(self, step=self.step[rows], stored=rows_of(self.stored, spec, rows))

    def encode(self, rounded: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of an (N, K) matrix whose elements lie on this grid."""
        groups = rounded.unflatten(-1, (self.step.shape[1], -1))
        divisor = torch.where(self.step == 0, 1, self.step)[..., None]
        codes = self.fmt.codes_of(groups / divisor)
        return {"qweight": pack(codes.flatten(-2)), **self.stored}


def absmax_scales(weight: torch.Tensor, fmt: Format, dtype: torch.dtype) -> WeightScales:
    """step = absmax of the group / largest code, as the format's own `encode_weight` has it; weight (N, K) float32"""
    absmax = weight.unflatten(-1, (-1, fmt.group_size)).abs().amax(-1)
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
    absmax = weight.unflatten(-1, (-1, fmt.group_size)).abs().amax(-1)
    upper = fmt.upper_scale(absmax, searching=True)
    best = torch.empty_like(absmax)
    rows = max(1, CHUNK // k)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        candidates = fmt.candidates(absmax[part], upper, dtype)
        best[part] = _best_step(weight[part].unflatten(-1, (-1, fmt.group_size)), candidates, share, fmt)
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


@dataclass(frozen=True)
class GptqFactor:
    """inverse(H[order][:, order] + damping) = upper.T @ upper, for one diagonal block of H that starts at `start`"""

    start: int
    order: torch.Tensor
    upper: torch.Tensor


def factorize(hessian: Gram, damping: float = DAMPING) -> list[GptqFactor]:
    """One factor per diagonal block; columns by falling diagonal, dead ones (diagonal zero) are left as they are."""
    return [
        GptqFactor(start, *_factorize_block(block, damping))
        for start, block in zip(hessian.starts, hessian.blocks, strict=True)
    ]


def _factorize_block(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    diagonal = hessian.diagonal()
    level = diagonal.mean().clamp_min(1e-30)
    order = torch.argsort(diagonal, descending=True, stable=True)
    # flipped: with F = reversed H = M M.T, the reversed M is upper, and its inverse is the factor that GPTQ needs
    flipped = order.flip(0)
    damped = hessian[flipped][:, flipped]
    damped.diagonal().add_(damping * level)
    damped.diagonal()[(diagonal <= 0)[flipped]] = 1
    wide = damped if len(damped) > Gram.WIDE else damped.double()
    # round-off of a nearly singular float32 matrix: the same again, and where many do not help, more and more
    rising = [max(damping, 1e-6) * 10**power for power in range(1, MOST_DAMPINGS + 1)]
    lower = cholesky(wide, [more * level for more in [damping] * ALIKE + rising])
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return order, upper.float().contiguous()


def gptq(target: torch.Tensor, factors: Sequence[GptqFactor], scales: WeightScales) -> torch.Tensor:
    """Q on the grid of `scales` with a small sum over rows of (target - Q) H (target - Q).T

    target (N, K) float32; returns (N, K). The scales stay what they are.
    """
    rounded = torch.empty_like(target)
    group = target.shape[1] // scales.step.shape[1]
    steps = scales.step.T.contiguous()  # (K/group, N): one column of the weight is one row here
    for factor in factors:
        columns = factor.start + factor.order
        done = _gptq_block(target[:, columns].T.contiguous(), factor.upper, steps, columns // group, scales)
        rounded[:, columns] = done.T
    return rounded


def _gptq_block(
    rest: torch.Tensor, upper: torch.Tensor, steps: torch.Tensor, groups: torch.Tensor, scales: WeightScales
) -> torch.Tensor:
    """rest (K, N) is overwritten: what is left of the target after the errors so far are made up for."""
    rounded = torch.empty_like(rest)
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        triangle = upper[start:stop, start:stop]
        pivots = triangle.diagonal().tolist()
        errors = torch.empty_like(rest[start:stop])
        for i, group in enumerate(groups[start:stop].tolist()):
            column = rest[start + i]
            if i:
                column = torch.addmv(column, errors[:i].T, triangle[:i, i], alpha=-1)
            near = scales.nearest(column, steps[group])
            rounded[start + i] = near
            errors[i] = (column - near) / pivots[i]
        if stop < len(rest):
            rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return rounded


@dataclass(frozen=True)
class WeightRounder:
    """How a layer's weight gets onto its grid.

    dtype       of 16-bit scales
    search      scales of least squared error; else absmax / largest code
    importance  (K,) weights of that error, the mean squared activation; None for all alike
    factors     of the Hessian: by GPTQ; empty: each element to nearest
    """

    fmt: Format
    dtype: torch.dtype
    search: bool = True
    importance: torch.Tensor | None = None
    factors: Sequence[GptqFactor] = ()

    def on_grid(self, wanted: torch.Tensor) -> tuple[torch.Tensor, WeightScales]:
        """(the rounded (N, K) float32, its scales) for what the 4-bit weight should be"""
        if self.search:
            scales = searched_scales(wanted, self.fmt, self.dtype, self.importance)
        else:
            scales = absmax_scales(wanted, self.fmt, self.dtype)
        return gptq(wanted, self.factors, scales) if self.factors else scales.round(wanted), scales
