"""Second moments of a layer's smoothed input, as the kernel sees it before and after rounding."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.formats import GELU_SHIFT
from ...kernels.layer import LayerSpec
from .rounding import round_activation

TOKENS_AT_ONCE = 2048
LARGEST_BLOCK = 16384  # columns of one Gram block: float32 takes 1 GiB there


@dataclass(frozen=True)
class Gram:
    """A symmetric (K, K) matrix, or its diagonal blocks where K is too large to hold it whole.

    starts  first column of each block
    blocks  square float32 matrices
    """

    WIDE: ClassVar[int] = 6144  # above this, factorizing in float64 would cost more memory than it is worth

    starts: tuple[int, ...]
    blocks: tuple[torch.Tensor, ...]

    @classmethod
    def zeros(cls, k: int, largest: int, device: torch.device) -> "Gram":
        """`largest` is the widest block allowed, cut to whole groups of 64 columns."""
        width = k if k <= largest else max(64, largest // 64 * 64)
        starts = tuple(range(0, k, width))
        return cls(starts, tuple(torch.zeros(min(width, k - s), min(width, k - s), device=device) for s in starts))

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + len(block)) for start, block in zip(self.starts, self.blocks, strict=True))

    def diagonal(self) -> torch.Tensor:
        return torch.cat([block.diagonal() for block in self.blocks])

    def add(self, x: torch.Tensor) -> None:
        """+= x.T @ x for rows x (M, K)"""
        for part, block in zip(self.slices, self.blocks, strict=True):
            block.addmm_(x[:, part].T, x[:, part])

    def finish(self, count: int, mean: torch.Tensor) -> None:
        """/ count - mean mean.T"""
        for part, block in zip(self.slices, self.blocks, strict=True):
            block.div_(count).addr_(mean[part], mean[part], alpha=-1)

    def root(self, damping: float) -> "Gram":
        """Lower triangular C with C C.T = this + damping * mean diagonal; any square root would do."""
        return Gram(self.starts, tuple(_root(block, damping) for block in self.blocks))

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """matrix @ this"""
        parts = zip(self.slices, self.blocks, strict=True)
        return torch.cat([matrix[:, part] @ block for part, block in parts], 1)

    def solve_transposed(self, columns: torch.Tensor) -> torch.Tensor:
        """inverse(this.T) @ columns for a triangular this; columns (K, R)"""
        parts = zip(self.slices, self.blocks, strict=True)
        return torch.cat([torch.linalg.solve_triangular(block.T, columns[part], upper=True) for part, block in parts])


def _root(block: torch.Tensor, damping: float) -> torch.Tensor:
    wide = block.clone() if len(block) > Gram.WIDE else block.double()
    level = wide.diagonal().mean().clamp_min(1e-30)
    wide.diagonal().add_(damping * level)
    lower, failed = torch.linalg.cholesky_ex(wide)
    while failed:
        damping = max(10 * damping, 1e-6)
        wide.diagonal().add_(damping * level)
        lower, failed = torch.linalg.cholesky_ex(wide)
    return lower.float()


def smoothed_chunks(
    tokens: torch.Tensor, smooth: torch.Tensor, spec: LayerSpec, at_once: int = TOKENS_AT_ONCE
) -> Iterator[torch.Tensor]:
    """(tokens + shift) / smooth in float32, some rows at a time; tokens (M, K) of any float dtype, on any device."""
    start, stop = spec.act_unsigned
    for first in range(0, len(tokens), at_once):
        z = tokens[first : first + at_once].to(smooth.device, torch.float32, copy=True)
        z[:, start:stop] += GELU_SHIFT
        yield z.div_(smooth)


@dataclass(frozen=True)
class Moments:
    """What the layer algorithms know of the input.

    mean, mean_rounded  (K,) of z = (x + shift) / smooth and of its rounding zq, zero when not centred
    raw, rounded        Gram of z and of zq around those means; one object when only one is kept
    count               tokens
    cross               E[z zq.T] (K, K) around the means, where it was asked for
    """

    mean: torch.Tensor
    mean_rounded: torch.Tensor
    raw: Gram
    rounded: Gram
    count: int
    cross: torch.Tensor | None = None


def gather(
    tokens: torch.Tensor,
    smooth: torch.Tensor,
    spec: LayerSpec,
    centred: bool = True,
    largest: int = LARGEST_BLOCK,
    both: bool = True,
    rounded: bool = True,
    cross: bool = False,
    centre: torch.Tensor | None = None,
) -> Moments:
    """Moments of `tokens` (M, K) at this smoothing, a few thousand rows in memory at a time.

    centred  around the mean: right when a bias can take up the mean
    largest  widest Gram block
    both     False keeps one Gram and uses it for both, at half the cost
    rounded  False takes the input as it is in place of its rounding, as the reference quantizer does
    cross    also gather the cross moment, a third matrix
    centre   see `round_activation`
    """
    k = spec.k
    total = torch.zeros(2, k, dtype=torch.float64, device=smooth.device)
    of_rounded = Gram.zeros(k, largest, smooth.device)
    both = both and rounded
    raw = Gram.zeros(k, largest, smooth.device) if both else of_rounded
    between = torch.zeros(k, k, device=smooth.device) if cross else None
    pilot = next(smoothed_chunks(tokens, smooth, spec)).mean(0) if centred else torch.zeros(k, device=smooth.device)
    for z in smoothed_chunks(tokens, smooth, spec):
        zq = (round_activation(z, spec, centre) if rounded else z).sub(pilot)
        z = z.sub_(pilot)  # sums around a pilot mean: no cancellation when the mean is large
        total += torch.stack([z.sum(0, dtype=torch.float64), zq.sum(0, dtype=torch.float64)])
        of_rounded.add(zq)
        if both:
            raw.add(z)
        if between is not None:
            between.addmm_(z.T, zq)
    means = (total / len(tokens)).float() if centred else torch.zeros(2, k, device=smooth.device)
    of_rounded.finish(len(tokens), means[1])
    if both:
        raw.finish(len(tokens), means[0])
    if between is not None:
        between.div_(len(tokens)).addr_(means[0], means[1], alpha=-1)
    return Moments(pilot + means[0], pilot + means[1], raw, of_rounded, len(tokens), between)
