"""A layer's input as the kernel sees it: shifted, smoothed, rounded, and the second moments of both.

    z = (x + shift) / smooth        zq = round(z - centre) + centre        centre = act_mean / smooth

x is what the model hands to the layer, the shift is that of unsigned channels. `smooth` is the vector that files and
kernels call `smooth_factor`, here always (K,) float32 that holds 16-bit values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.formats import GELU_SHIFT
from ...kernels.layer import LayerError, LayerSpec
from ...kernels.roundtrip import rounded as round_trip
from ..recipe import HESSIAN_STEP

TOKENS_AT_ONCE = 2048
MOST_DAMPINGS = 12  # each ten times the one before
LARGEST_BLOCK = 16384  # columns of one Gram block: float32 takes 1 GiB there


def to_16bit(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of `dtype`, in float32"""
    return tensor.to(dtype).float()


def shift_of(spec: LayerSpec, device: torch.device) -> torch.Tensor:
    """(K,) what is added to each activation channel before smoothing."""
    shift = torch.zeros(spec.k, device=device)
    shift[slice(*spec.act_unsigned)] = GELU_SHIFT
    return shift


def mean_of(tokens: torch.Tensor, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """act_mean (K,) = E[x], zero in unsigned channels, which need every code above zero; 16-bit values in float32"""
    mean = torch.zeros(spec.k, dtype=torch.float64, device=device)
    for x in tokens.split(TOKENS_AT_ONCE):
        mean += x.to(device).sum(0, dtype=torch.float64)
    mean /= len(tokens)
    mean[slice(*spec.act_unsigned)] = 0
    return to_16bit(mean, dtype)


def round_activation(z: torch.Tensor, spec: LayerSpec, centre: torch.Tensor | None = None) -> torch.Tensor:
    """What the kernels make of a smoothed, shifted activation (M, K) float32, by the layer's rule, decoded again.

    centre  (K,) act_mean / smooth: taken off before the rounding and added after it
    """
    if spec.act_bits == 8:
        return _round_int8(z, spec)
    return round_trip(z, spec) if centre is None else round_trip(z - centre, spec).add_(centre)


def _round_int8(z: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """By groups (w4a8), or by rows where the format has no such mode (w4a8-jit)"""
    groups = z.unflatten(-1, (-1, spec.fmt.act8_group or spec.k))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (groups / torch.where(scale == 0, 1, scale)).round_().mul_(scale).flatten(-2)


@dataclass(frozen=True)
class LayerInput:
    """Tokens (M, K) of any float dtype, on any device, and the smoothing and centring under which they are seen."""

    tokens: torch.Tensor
    smooth: torch.Tensor
    spec: LayerSpec
    centre: torch.Tensor | None = None

    @classmethod
    def plain(cls, tokens: torch.Tensor, spec: LayerSpec, device: torch.device) -> "LayerInput":
        """Shifted, but not smoothed."""
        return cls(tokens, torch.ones(spec.k, device=device), spec)

    def chunks(self, at_once: int = TOKENS_AT_ONCE) -> Iterator[torch.Tensor]:
        """z in float32 on the device of `smooth`, some rows at a time."""
        start, stop = self.spec.act_unsigned
        for first in range(0, len(self.tokens), at_once):
            z = self.tokens[first : first + at_once].to(self.smooth.device, torch.float32, copy=True)
            z[:, start:stop] += GELU_SHIFT
            yield z.div_(self.smooth)

    def whole(self, stride: int = 1) -> torch.Tensor:
        """z of every `stride`-th token, as one tensor"""
        return torch.cat(list(LayerInput(self.tokens[::stride], self.smooth, self.spec).chunks()))

    def probe(self, count: int) -> torch.Tensor:
        """z of at most `count` tokens, spread evenly"""
        stride = max(1, len(self.tokens) // count)
        return LayerInput(self.tokens[::stride][:count], self.smooth, self.spec).whole()

    def rounded(self, z: torch.Tensor) -> torch.Tensor:
        """zq"""
        return round_activation(z, self.spec, self.centre)


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
        width = k if k <= largest else max(HESSIAN_STEP, largest // HESSIAN_STEP * HESSIAN_STEP)
        starts = tuple(range(0, k, width))
        return cls(starts, tuple(torch.zeros(min(width, k - s), min(width, k - s), device=device) for s in starts))

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + len(block)) for start, block in zip(self.starts, self.blocks, strict=True))

    def powers(self) -> torch.Tensor:
        """(K,) the mean square of each channel: the diagonal"""
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
    more, dampings = damping, []
    for _ in range(MOST_DAMPINGS):
        more = max(10 * more, 1e-6)
        dampings.append(more * level)
    return cholesky(wide, dampings).float()


def cholesky(matrix: torch.Tensor, dampings: Sequence[torch.Tensor]) -> torch.Tensor:
    """Lower triangular C with C C.T = matrix + as many of `dampings` on its diagonal as that needs; in place

    More than a few are needed by no matrix of second moments. raises  LayerError after the last one
    """
    if not matrix.diagonal().isfinite().all():
        raise LayerError("the second moments of its input are not finite; the statistics hold NaN, Inf or huge values")
    lower, failed = torch.linalg.cholesky_ex(matrix)
    for damping in dampings:
        if not failed:
            break
        matrix.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed or not lower.isfinite().all():
        raise LayerError(
            f"the second moments of its input cannot be factorized, with {len(dampings)} dampings either; calibrate "
            "again, the statistics are damaged"
        )
    return lower


@dataclass(frozen=True)
class Moments:
    """What the layer algorithms know of the input.

    mean, mean_rounded  (K,) of z and of zq, zero when not centred
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
    inputs: LayerInput,
    centred: bool = True,
    largest: int = LARGEST_BLOCK,
    both: bool = True,
    rounded: bool = True,
    cross: bool = False,
) -> Moments:
    """Moments of a layer's input, a few thousand rows in memory at a time.

    centred  around the mean: right when a bias can take up the mean
    largest  widest Gram block
    both     False keeps one Gram and uses it for both, at half the cost
    rounded  False takes the input as it is in place of its rounding, as the reference quantizer does
    cross    also gather the cross moment, a third matrix
    """
    k, device, count = inputs.spec.k, inputs.smooth.device, len(inputs.tokens)
    total = torch.zeros(2, k, dtype=torch.float64, device=device)
    of_rounded = Gram.zeros(k, largest, device)
    both = both and rounded
    raw = Gram.zeros(k, largest, device) if both else of_rounded
    between = torch.zeros(k, k, device=device) if cross else None
    pilot = next(inputs.chunks()).mean(0) if centred else torch.zeros(k, device=device)
    for z in inputs.chunks():
        zq = (inputs.rounded(z) if rounded else z).sub(pilot)
        z = z.sub_(pilot)  # sums around a pilot mean: no cancellation when the mean is large
        total += torch.stack([z.sum(0, dtype=torch.float64), zq.sum(0, dtype=torch.float64)])
        of_rounded.add(zq)
        if both:
            raw.add(z)
        if between is not None:
            between.addmm_(z.T, zq)
    means = (total / count).float() if centred else torch.zeros(2, k, device=device)
    of_rounded.finish(count, means[1])
    if both:
        raw.finish(count, means[0])
    if between is not None:
        between.div_(count).addr_(means[0], means[1], alpha=-1)
    return Moments(pilot + means[0], pilot + means[1], raw, of_rounded, count, between)
