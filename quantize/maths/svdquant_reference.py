"""The reference recipe, as the yardstick: SVDQuant as its authors' quantizer does it.

39 smoothing candidates, each judged by the layer's output error with its own SVD inside; then L = SVD_r(W - Q),
Q = round(W - L) until the error first rises; absmax scales; optionally GPTQ on the residual.
Source: SVDQuant, arXiv 2411.05007, and the configuration that its quantizer ships for diffusion models.
"""

from collections.abc import Callable
from functools import partial

import torch

from ...kernels.layer import LayerSpec
from ..recipe import Recipe
from . import lowrank
from .gptq import factorize, gptq
from .moments import gather, smoothed_chunks
from .refine import Fit, corrected_bias, to_16bit
from .rounding import absmax_scales, round_activation
from .smooth import from_spans

TOKENS = 1024  # on which candidates are compared
MOST_ROUNDS = 100
GRID = ((0.0, 0.0), *((i / 20, 0.0) for i in range(1, 20)), *((i / 20, 1 - i / 20) for i in range(1, 20)))

Split = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def splitter(seed: int, exact: bool) -> Split:
    """The SVD to use: the reference's full float64 one, or a randomized one that costs a few percent of its time."""
    return lowrank.split_exactly if exact else partial(lowrank.split, seed=seed, power_steps=3)


def grid_search(
    weight: torch.Tensor, spec: LayerSpec, tokens: torch.Tensor, rank: int, dtype: torch.dtype, split: Split
) -> torch.Tensor:
    """smooth_factor (K,) with the least output error of the 39 candidates absmax_x ** a / absmax_w ** b"""
    probe = _shifted(tokens, spec)
    span_x = torch.stack([x.abs().amax(0) for x in smoothed_chunks(tokens, torch.ones_like(probe[0]), spec)]).amax(0)
    span_w, exact = weight.abs().amax(0), probe @ weight.T
    least, best = None, None
    for a, b in GRID:
        smooth = to_16bit(from_spans(span_x, span_w, a, b), dtype)
        target, z = weight * smooth, probe / smooth
        down, up = split(target, rank)
        residual = target - up @ down.T
        rounded = absmax_scales(residual, spec.fmt, dtype).round(residual)
        got = (z @ down) @ up.T + round_activation(z, spec) @ rounded.T
        error = (got - exact).square().sum().item()
        if least is None or error < least:
            least, best = error, smooth
    return best


def svdquant(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    spec: LayerSpec,
    tokens: torch.Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    rank: int | None = None,
    exact_svd: bool = False,
    smooth: torch.Tensor | None = None,
) -> Fit:
    """One layer by the reference recipe. Arguments as for `refine`; `smooth` skips the grid."""
    rank = spec.rank if rank is None else rank
    split = splitter(recipe.seed, exact_svd)
    if smooth is None:
        smooth = grid_search(weight, spec, tokens, rank, dtype, split)
    target, z = weight * smooth, _shifted(tokens, spec) / smooth
    zq, exact = round_activation(z, spec), z @ target.T
    least, best, rounded = None, None, torch.zeros_like(target)
    for _ in range(MOST_ROUNDS):
        down, up = split(target - rounded, rank)
        residual = target - up @ down.T
        rounded = absmax_scales(residual, spec.fmt, dtype).round(residual)
        error = ((z @ down) @ up.T + zq @ rounded.T - exact).square().sum().item()
        if least is not None and error > least:
            break
        least, best = error, (down, up)
    proj_down, proj_up = to_16bit(best[0] / smooth[:, None], dtype), to_16bit(best[1], dtype)
    residual = target - proj_up @ (proj_down * smooth[:, None]).T
    scales = absmax_scales(residual, spec.fmt, dtype)
    if recipe.name == "svdquant+gptq":
        hessian = gather(tokens, smooth, spec, centred=False, rounded=False).raw
        rounded = gptq(residual, factorize(hessian), scales)
    else:
        rounded = scales.round(residual)
    new_bias = corrected_bias(residual, rounded, bias, spec, smooth, None, smooth)
    return Fit(smooth, rounded, scales, proj_down, proj_up, new_bias)


def _shifted(tokens: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    stride = max(1, len(tokens) // TOKENS)
    probe = tokens[::stride][:TOKENS]
    return next(smoothed_chunks(probe, torch.ones(spec.k, device=probe.device), spec))
