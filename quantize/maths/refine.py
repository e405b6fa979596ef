"""One layer with data: alternate scales, GPTQ and low-rank fit until the output error stops falling."""

from dataclasses import dataclass

import torch

from ...kernels.formats import GELU_SHIFT
from ...kernels.layer import Layer, LayerSpec, mean_term
from ..recipe import Recipe
from . import lowrank
from .gptq import factorize, gptq
from .moments import LARGEST_BLOCK, TOKENS_AT_ONCE, Moments, gather, smoothed_chunks
from .rounding import WeightScales, round_activation, searched_scales

PROBE = 1024  # calibration tokens on which two rounds of the alternation are compared
NOISE_TOKENS = 50  # per channel: with fewer, following the input's noise fits the tokens and not the layer
BOTH_GRAMS = 6144  # above this K one Gram serves GPTQ and the fit: the second costs more than it gains


@dataclass(frozen=True)
class Fit:
    """A finished layer as matrices: y = round((x + shift) / smooth) @ rounded.T + (x @ proj_down) @ proj_up.T + bias

    rounded lies on the grid of `scales`; smooth, proj_down, proj_up and act_mean hold 16-bit values in float32.
    With act_mean, round(z) is round(z - centre) + centre.
    """

    smooth: torch.Tensor
    rounded: torch.Tensor
    scales: WeightScales
    proj_down: torch.Tensor
    proj_up: torch.Tensor
    bias: torch.Tensor | None
    act_mean: torch.Tensor | None = None

    @property
    def centre(self) -> torch.Tensor | None:
        """act_mean after smoothing"""
        return None if self.act_mean is None else self.act_mean / self.smooth

    def layer(self, spec: LayerSpec, dtype: torch.dtype) -> Layer:
        """The stored layer; a fit of smaller rank is padded to `spec.rank`."""
        tensors = {**self.scales.encode(self.rounded), "smooth_factor": self.smooth.to(dtype)}
        if spec.rank:
            tensors["proj_down"] = lowrank.pad(self.proj_down, spec.rank).to(dtype)
            tensors["proj_up"] = lowrank.pad(self.proj_up, spec.rank).to(dtype)
        if self.act_mean is not None:
            tensors["act_mean"] = self.act_mean.to(dtype)
            tensors["out_mean"] = mean_term(self.rounded, self.smooth, self.act_mean)
        return Layer(spec, tensors)


@dataclass(frozen=True)
class Errors:
    """Relative output errors on some tokens, each ||difference|| / ||x @ W.T||.

    total       of the layer as the kernels run it
    activation  of rounding the activation alone: (zq - z) @ rounded.T
    weight      of what remains with exact activations
    by_bucket   total error of the tokens of each step bucket, None where a bucket has no token
    """

    total: float
    activation: float
    weight: float
    by_bucket: tuple[float | None, ...] = ()


def to_16bit(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
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


def refine(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    spec: LayerSpec,
    smooth: torch.Tensor,
    tokens: torch.Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    rank: int | None = None,
    largest: int = LARGEST_BLOCK,
    act_mean: torch.Tensor | None = None,
) -> Fit:
    """argmin over 4-bit Q and rank-r L of E ||W z - L z - Q round(z)||^2, z = (x + shift) / smooth, by alternation

    weight   (N, K) float32, bias (N,) or None; without a bias no mean is corrected
    smooth   (K,) float32 holding values of `dtype`
    tokens   (M, K) activations before shift and smoothing
    rank     of the fit, at most spec.rank; spec.rank if None
    largest  widest Gram block; a smaller one takes less memory and sees fewer correlations
    act_mean (K,) to take off before rounding, see `mean_of`
    """
    rank = spec.rank if rank is None else rank
    both = spec.k <= BOTH_GRAMS
    follow = recipe.input_noise and both and spec.k <= largest and len(tokens) >= NOISE_TOKENS * spec.k
    centre = None if act_mean is None else act_mean / smooth
    moments = gather(tokens, smooth, spec, bias is not None, largest, both, cross=follow, centre=centre)
    damping = recipe.damping * max(1.0, spec.k / moments.count)  # fewer tokens than channels: trust H less
    factors = factorize(moments.rounded, damping)
    root = moments.raw.root(max(1e-5, recipe.refit_damping * spec.k / moments.count)) if rank else None
    noise = InputNoise.of(moments, damping) if follow else InputNoise()
    importance = moments.rounded.diagonal()
    target = weight * smooth
    probe = _Probe.of(target, tokens, smooth, spec, moments, centre)

    down, up = start(target, rank, recipe, spec, dtype, importance)
    best = None
    for _ in range(recipe.rounds):
        residual = noise.wanted_of_rounded(target - up @ down.T)
        scales = searched_scales(residual, spec.fmt, dtype, importance)
        rounded = gptq(residual, factors, scales)
        if rank:
            down, up = lowrank.refit(noise.left_for_branch(target, rounded), root, rank, recipe.seed)
        error = probe.error(rounded, down, up)
        if best is not None and error >= best[0]:
            break
        best = error, down, up
    _, down, up = best
    # the branch as it will be stored is what the last rounding has to complement
    proj_down, proj_up = to_16bit(down / smooth[:, None], dtype), to_16bit(up, dtype)
    residual = target - proj_up @ (proj_down * smooth[:, None]).T
    wanted = noise.wanted_of_rounded(residual)
    scales = searched_scales(wanted, spec.fmt, dtype, importance)
    rounded = gptq(wanted, factors, scales)
    mean = moments.mean if recipe.bias_correction else None
    new_bias = corrected_bias(residual, rounded, bias, spec, smooth, mean, moments.mean_rounded)
    return Fit(smooth, rounded, scales, proj_down, proj_up, new_bias, act_mean)


@dataclass(frozen=True)
class InputNoise:
    """What the rounding error of the activation asks of the weights, when it is not independent of the activation.

    ||R z - Q zq||^2 is least over all Q at R C inverse(H), and over all R at Q C.T inverse(S), with S = E[z z.T],
    H = E[zq zq.T] and C = E[z zq.T]; without correlation both are 1. Source: GPTAQ, arXiv 2504.02692.

    to_rounded  C inverse(H) - 1, None when the noise is taken as independent
    to_exact    C.T inverse(S) - 1
    """

    to_rounded: torch.Tensor | None = None
    to_exact: torch.Tensor | None = None

    @classmethod
    def of(cls, moments: Moments, damping: float) -> "InputNoise":
        (raw,), (rounded,), cross = moments.raw.blocks, moments.rounded.blocks, moments.cross
        return cls(_over(cross - rounded, rounded, damping), _over(cross.T - raw, raw, damping))

    def wanted_of_rounded(self, residual: torch.Tensor) -> torch.Tensor:
        """What the 4-bit weight should be for W - L = residual."""
        return residual if self.to_rounded is None else residual + residual @ self.to_rounded

    def left_for_branch(self, target: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        """What the branch should add to the 4-bit weight."""
        left = target - rounded
        return left if self.to_exact is None else left - rounded @ self.to_exact


def _over(matrix: torch.Tensor, gram: torch.Tensor, damping: float) -> torch.Tensor:
    """matrix @ inverse(gram + damping * mean diagonal), in float64"""
    wide = gram.double()
    wide.diagonal().add_(damping * wide.diagonal().mean().clamp_min(1e-30))
    return torch.linalg.solve(wide, matrix.double().T).T.float()


def start(
    target: torch.Tensor,
    rank: int,
    recipe: Recipe,
    spec: LayerSpec,
    dtype: torch.dtype,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """L = SVD_r(target - Q), Q = round(target - L), a few cheap times before the first GPTQ; returns (down, up)"""
    if not rank:
        return target.new_zeros(target.shape[1], 0), target.new_zeros(target.shape[0], 0)
    down, up = lowrank.split(target, rank, recipe.seed)
    least, best = None, (down, up)
    for _ in range(recipe.start_rounds):
        residual = target - up @ down.T
        rounded = searched_scales(residual, spec.fmt, dtype, importance).round(residual)
        difference = residual - rounded
        error = (difference.square() * (1 if importance is None else importance)).sum().item()
        if least is not None and error >= least:
            break
        least, best = error, (down, up)
        down, up = lowrank.split(target - rounded, rank, recipe.seed, power_steps=2)
    return best


def corrected_bias(
    residual: torch.Tensor,
    rounded: torch.Tensor,
    bias: torch.Tensor | None,
    spec: LayerSpec,
    smooth: torch.Tensor,
    mean: torch.Tensor | None,
    mean_rounded: torch.Tensor,
) -> torch.Tensor | None:
    """b' = b - residual @ (shift / smooth) + residual @ E[z] - rounded @ E[zq]; without means only the shift comes off

    residual  (N, K) = W smooth - L, the part that the 4-bit weight stands for
    """
    if bias is None:
        return None
    shift = shift_of(spec, smooth.device) / smooth
    if mean is None:
        return bias - rounded @ shift
    return bias + residual @ (mean - shift) - rounded @ mean_rounded


@dataclass(frozen=True)
class _Probe:
    """The calibration objective on a few tokens: sums of squares over tokens and outputs, around the means."""

    exact: torch.Tensor  # (T, N)
    z: torch.Tensor
    zq: torch.Tensor

    @classmethod
    def of(
        cls,
        target: torch.Tensor,
        tokens: torch.Tensor,
        smooth: torch.Tensor,
        spec: LayerSpec,
        moments: Moments,
        centre: torch.Tensor | None,
    ) -> "_Probe":
        stride = max(1, len(tokens) // PROBE)
        z = next(smoothed_chunks(tokens[::stride][:PROBE], smooth, spec))
        zq = round_activation(z, spec, centre) - moments.mean_rounded
        z = z - moments.mean
        return cls(z @ target.T, z, zq)

    def error(self, rounded: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> float:
        branch = (self.z @ down) @ up.T
        return (self.exact - branch).sub_(self.zq @ rounded.T).square_().sum().item()


def output_errors(
    fit: Fit,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    spec: LayerSpec,
    tokens: torch.Tensor,
    buckets: torch.Tensor | None = None,
    bucket_count: int = 0,
) -> Errors:
    """The errors of `fit` against x @ W.T + bias on tokens (M, K) that it was not fitted to."""
    sums = torch.zeros(4, len(tokens), dtype=torch.float64)  # total, activation, weight, exact
    shift, centre, first = shift_of(spec, weight.device) / fit.smooth, fit.centre, 0
    offset = 0 if bias is None else fit.bias - bias
    for z in smoothed_chunks(tokens, fit.smooth, spec, at_once=512):
        raw = (z - shift) * fit.smooth
        exact = raw @ weight.T
        with_z = z @ fit.rounded.T
        with_zq = round_activation(z, spec, centre) @ fit.rounded.T
        common = (raw @ fit.proj_down) @ fit.proj_up.T + offset - exact
        parts = (with_zq + common, with_zq - with_z, with_z + common, exact)
        for row, part in enumerate(parts):
            sums[row, first : first + len(z)] = part.square().sum(1).double().cpu()
        first += len(z)
    total, activation, of_weight, exact = sums.sum(1).tolist()
    exact = exact or 1e-300  # a layer that only ever gives zeros, and is right, has no error
    by_bucket = []
    for bucket in range(bucket_count):
        inside = sums[:, buckets == bucket]
        by_bucket.append((inside[0].sum() / inside[3].sum()).sqrt().item() if inside[3].sum() > 0 else None)
    return Errors((total / exact) ** 0.5, (activation / exact) ** 0.5, (of_weight / exact) ** 0.5, tuple(by_bucket))
