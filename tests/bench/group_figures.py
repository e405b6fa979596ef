"""What one low-rank branch for q, k and v costs: error against a branch for each, at the same rank and at equal bytes.

Equal bytes: one proj_down (K, R) and three proj_up (N, R) take what three branches of rank r take where R = 1.5 r.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from svdquant_pack.kernels import LayerSpec
from svdquant_pack.quantize.maths import smooth
from svdquant_pack.quantize.maths.fit import data_free, refine
from svdquant_pack.quantize.maths.inputs import LayerInput, mean_of, to_16bit
from svdquant_pack.quantize.maths.layer import Dense, Making, output_errors
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.bench.synthetic_layers import heavy_weight, make

BF16 = torch.bfloat16
TOKENS = 2048


def error(layers: Sequence[Dense], tokens: torch.Tensor, test: torch.Tensor, recipe: Recipe, shared: bool) -> float:
    """Relative output error of all layers together on other tokens, under one smoothing"""
    spec, making = layers[0].spec, Making(recipe, BF16)
    weights = [dense.weight for dense in layers]
    if recipe.needs_data:
        act_mean = mean_of(tokens, spec, BF16, tokens.device)
        seen = smooth.Inputs.of(LayerInput.plain(tokens, spec, tokens.device).whole() - act_mean)
        factor = to_16bit(smooth.search(weights, seen, spec, recipe.seed, recipe.adam_steps), BF16)
        fit = partial(refine, smooth=factor, tokens=tokens, making=making, act_mean=act_mean)
    else:
        factor = to_16bit(smooth.from_weight_spans(torch.cat(weights), recipe.smooth_power), BF16)
        fit = partial(data_free, smooth=factor, making=making)
    wrong = power = 0.0
    for dense in [Dense.stacked(layers)] if shared else layers:
        size = (test @ dense.weight.T).square().sum().item()
        wrong, power = wrong + output_errors(fit(dense), dense, test).total ** 2 * size, power + size
    return (wrong / power) ** 0.5


def synthetic(seed: int, n: int = 384) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(weights, calibration, test): three weights without a direction in common, the most that sharing can cost"""
    layer, generator = make("adaln", n, n, TOKENS, seed, 512), torch.Generator().manual_seed(seed)
    return [layer.weight, *(heavy_weight(n, n, generator) for _ in range(2))], layer.calibration, layer.test


def trained(seed: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The same of the demo model's first image attention, whose q, k and v are trained"""
    from svdquant_pack.tests.bench.tiny_flux import TinyFlux

    flux = TinyFlux()
    unit = next(unit for unit in flux.units if unit.module.endswith("img_attn.qkv"))
    tokens, test = (flux.inputs(2, 10 * seed + place)[unit.module] for place in (1, 2))
    return list(unit.weight(flux.model).chunk(3)), tokens[:: max(1, len(tokens) // TOKENS)], test


def ratios(
    weights: Sequence[torch.Tensor], tokens: torch.Tensor, test: torch.Tensor, recipe: Recipe
) -> tuple[float, float, float]:
    """(error with a branch for each, ratio of one for all at the same rank, at equal bytes)"""
    n, k = weights[0].shape
    spec = LayerSpec(recipe.format, n, k, recipe.rank, (0, 0), recipe.act_rule)

    def of(rank: int, shared: bool) -> float:
        layers = [Dense(weight, torch.zeros(n), replace(spec, rank=rank)) for weight in weights]
        return error(layers, tokens, test, recipe, shared)

    own = of(recipe.rank, False)
    return own, of(recipe.rank, True) / own, of(recipe.rank * 3 // 2, True) / own
