"""Three ways to fit one layer, W smooth = L + Q with L of rank r and Q on the 4-bit grid.

data_free  by turns over L and Q, without looking at the activation
refine     scales, GPTQ and low-rank fit by turns, until the output error on calibration tokens stops falling
svdquant   the reference, as its authors' quantizer does it: the yardstick. 39 smoothing candidates, each judged by the
           layer's output error with its own SVD inside; then L = SVD_r(W - Q), Q = round(W - L) until the error first
           rises; absmax scales; optionally GPTQ on the residual. Source: SVDQuant, arXiv 2411.05007, and the
           configuration that its quantizer ships for diffusion models.

Each ends alike: the branch is rounded to 16 bit, and the last 4-bit weight complements it as it is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..recipe import Recipe
from . import lowrank
from .inputs import LayerInput, Moments, gather, round_activation, shift_of, to_16bit
from .layer import Dense, FittedLayer, Making
from .rounding import WeightRounder, WeightScales, factorize
from .smooth import from_spans

PROBE = 1024  # calibration tokens on which two rounds of an alternation, or two candidates, are compared
NOISE_TOKENS = 50  # per channel: with fewer, following the input's noise fits the tokens and not the layer
BOTH_GRAMS = 6144  # above this K one Gram serves GPTQ and the fit: the second costs more than it gains
MOST_ROUNDS = 100  # of the reference
GRID = ((0.0, 0.0), *((i / 20, 0.0) for i in range(1, 20)), *((i / 20, 1 - i / 20) for i in range(1, 20)))

Branch = tuple[torch.Tensor, torch.Tensor]
"""(down (K, R), up (N, R)) of L = up @ down.T, which sees the smoothed activation"""
Split = Callable[[torch.Tensor], Branch]


@dataclass(frozen=True)
class StoredBranch:
    """The low-rank branch as it will be stored: it sees the unsmoothed activation, and 16-bit rounding is part of it.

    residual  (N, K) = W smooth - L, what the 4-bit weight has to stand for
    """

    smooth: torch.Tensor
    proj_down: torch.Tensor
    proj_up: torch.Tensor
    residual: torch.Tensor

    @classmethod
    def of(cls, branch: Branch, target: torch.Tensor, smooth: torch.Tensor, dtype: torch.dtype) -> "StoredBranch":
        """target (N, K) = W smooth"""
        down, up = branch
        proj_down, proj_up = to_16bit(down / smooth[:, None], dtype), to_16bit(up, dtype)
        return cls(smooth, proj_down, proj_up, target - proj_up @ (proj_down * smooth[:, None]).T)

    def with_weight(
        self,
        rounded: torch.Tensor,
        scales: WeightScales,
        dense: Dense,
        moments: Moments | None = None,
        act_mean: torch.Tensor | None = None,
    ) -> FittedLayer:
        """The layer of this branch and a 4-bit weight, with the bias that completes them

        bias = b + residual @ (E[z] - shift / smooth) - rounded @ E[zq]; without moments only the shift comes off
        """
        bias = dense.bias
        if bias is not None:
            shift = shift_of(dense.spec, bias.device) / self.smooth
            if moments is None:
                bias = bias - rounded @ shift
            else:
                bias = bias + self.residual @ (moments.mean - shift) - rounded @ moments.mean_rounded
        return FittedLayer(self.smooth, rounded, scales, self.proj_down, self.proj_up, bias, act_mean)


def data_free(dense: Dense, smooth: torch.Tensor, making: Making, search: bool = True) -> FittedLayer:
    """min ||W smooth - L - Q|| by turns over L of rank r and Q on the 4-bit grid, at a given smoothing

    search  False: absmax scales, one turn; what SVDQuant is without its search
    """
    spec, recipe = dense.spec, making.recipe
    rounder = WeightRounder(spec.fmt, making.dtype, search)
    target, rounded = dense.weight * smooth, torch.zeros_like(dense.weight)
    best: tuple[float, FittedLayer] | None = None
    for _ in range(recipe.alternations if search and spec.rank else 1):
        branch = lowrank.split(target - rounded, spec.rank, recipe.seed)
        stored = StoredBranch.of(branch, target, smooth, making.dtype)
        rounded, scales = rounder.on_grid(stored.residual)
        error = (stored.residual - rounded).norm().item()
        if best is not None and error >= best[0]:
            break
        best = error, stored.with_weight(rounded, scales, dense)
    assert best is not None
    return best[1]


def refine(
    dense: Dense, smooth: torch.Tensor, tokens: torch.Tensor, making: Making, act_mean: torch.Tensor | None = None
) -> FittedLayer:
    """argmin over 4-bit Q and rank-r L of E ||W z - L z - Q round(z)||^2, z = (x + shift) / smooth, by alternation

    dense     in float32; without a bias no mean is corrected
    smooth    (K,) float32 holding values of `making.dtype`
    tokens    (M, K) activations before shift and smoothing
    act_mean  (K,) to take off before rounding, see `mean_of`
    """
    spec, recipe = dense.spec, making.recipe
    inputs = LayerInput(tokens, smooth, spec, None if act_mean is None else act_mean / smooth)
    both, largest = spec.k <= BOTH_GRAMS, recipe.hessian_block
    follow = recipe.input_noise and both and spec.k <= largest and len(tokens) >= NOISE_TOKENS * spec.k
    moments = gather(inputs, dense.bias is not None, largest, both, cross=follow)
    damping = recipe.damping * max(1.0, spec.k / moments.count)  # fewer tokens than channels: trust H less
    nearest = WeightRounder(spec.fmt, making.dtype, importance=moments.rounded.powers())
    rounder = replace(nearest, factors=factorize(moments.rounded, damping))
    root = moments.raw.root(max(1e-5, recipe.refit_damping * spec.k / moments.count)) if spec.rank else None
    noise = InputNoise.of(moments, damping) if follow else InputNoise()
    target = dense.weight * smooth
    probe = _Probe.of(target, inputs, moments)

    best = down, up = start(target, spec.rank, recipe, nearest)
    least = None
    for _ in range(recipe.rounds):
        rounded, _ = rounder.on_grid(noise.wanted_of_rounded(target - up @ down.T))
        if root is not None:
            down, up = lowrank.refit(noise.left_for_branch(target, rounded), root, spec.rank, recipe.seed)
        error = probe.error(rounded, down, up)
        if least is not None and error >= least:
            break
        least, best = error, (down, up)
    stored = StoredBranch.of(best, target, smooth, making.dtype)
    rounded, scales = rounder.on_grid(noise.wanted_of_rounded(stored.residual))
    return stored.with_weight(rounded, scales, dense, moments if recipe.bias_correction else None, act_mean)


def start(target: torch.Tensor, rank: int, recipe: Recipe, rounder: WeightRounder) -> Branch:
    """L = SVD_r(target - Q), Q = round(target - L), a few cheap times before the first GPTQ"""
    if not rank:
        return target.new_zeros(target.shape[1], 0), target.new_zeros(target.shape[0], 0)
    down, up = lowrank.split(target, rank, recipe.seed)
    least, best = None, (down, up)
    for _ in range(recipe.start_rounds):
        residual = target - up @ down.T
        rounded, _ = rounder.on_grid(residual)
        difference = residual - rounded
        error = (difference.square() * (1 if rounder.importance is None else rounder.importance)).sum().item()
        if least is not None and error >= least:
            break
        least, best = error, (down, up)
        down, up = lowrank.split(target - rounded, rank, recipe.seed, power_steps=2)
    return best


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
        assert cross is not None
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


@dataclass(frozen=True)
class _Probe:
    """The calibration objective on a few tokens: sums of squares over tokens and outputs, around the means."""

    exact: torch.Tensor  # (T, N)
    z: torch.Tensor
    zq: torch.Tensor

    @classmethod
    def of(cls, target: torch.Tensor, inputs: LayerInput, moments: Moments) -> "_Probe":
        z = inputs.probe(PROBE)
        zq = inputs.rounded(z) - moments.mean_rounded
        z = z - moments.mean
        return cls(z @ target.T, z, zq)

    def error(self, rounded: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> float:
        branch = (self.z @ down) @ up.T
        return (self.exact - branch).sub_(self.zq @ rounded.T).square_().sum().item()


def svdquant(
    dense: Dense, tokens: torch.Tensor, making: Making, exact_svd: bool = False, smooth: torch.Tensor | None = None
) -> FittedLayer:
    """One layer by the reference recipe. Arguments as for `refine`

    exact_svd  the reference's full float64 SVD, or a randomized one that costs a few percent of its time
    smooth     skips the search of the 39 candidates
    """
    spec, recipe = dense.spec, making.recipe
    split: Split = partial(lowrank.split, rank=spec.rank, seed=recipe.seed, power_steps=3)
    if exact_svd:
        split = partial(lowrank.split_exactly, rank=spec.rank)
    if smooth is None:
        smooth = grid_search(dense, tokens, making.dtype, split)
    inputs, rounder = LayerInput(tokens, smooth, spec), WeightRounder(spec.fmt, making.dtype, search=False)
    target, z = dense.weight * smooth, inputs.probe(PROBE)
    zq, exact = inputs.rounded(z), z @ target.T
    best = down, up = split(target)
    least = None
    for _ in range(MOST_ROUNDS):
        rounded, _ = rounder.on_grid(target - up @ down.T)
        error = ((z @ down) @ up.T + zq @ rounded.T - exact).square().sum().item()
        if least is not None and error > least:
            break
        least, best = error, (down, up)
        down, up = split(target - rounded)
    if recipe.name == "svdquant+gptq":
        rounder = replace(rounder, factors=factorize(gather(inputs, centred=False, rounded=False).raw))
    stored = StoredBranch.of(best, target, smooth, making.dtype)
    return stored.with_weight(*rounder.on_grid(stored.residual), dense)


def grid_search(dense: Dense, tokens: torch.Tensor, dtype: torch.dtype, split: Split) -> torch.Tensor:
    """smooth (K,) with the least output error of the 39 candidates absmax_x ** a / absmax_w ** b"""
    spec, weight = dense.spec, dense.weight
    plain = LayerInput.plain(tokens, spec, weight.device)
    rounder = WeightRounder(spec.fmt, dtype, search=False)
    probe = plain.probe(PROBE)
    span_x = torch.stack([x.abs().amax(0) for x in plain.chunks()]).amax(0)
    span_w, exact = weight.abs().amax(0), probe @ weight.T
    best, least = torch.ones_like(span_x), None
    for a, b in GRID:
        smooth = to_16bit(from_spans(span_x, span_w, a, b), dtype)
        target, z = weight * smooth, probe / smooth
        down, up = split(target)
        rounded, _ = rounder.on_grid(target - up @ down.T)
        got = (z @ down) @ up.T + round_activation(z, spec) @ rounded.T
        error = (got - exact).square().sum().item()
        if least is None or error < least:
            least, best = error, smooth
    return best
