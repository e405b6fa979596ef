"""Apply a recipe's budget to a plan: measure every layer once, then let the budget decide."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..kernels.layer import LayerSpec
from . import smooth
from .budget import BudgetError, Unit, allocate, tails
from .moments import smoothed_chunks
from .recipe import Recipe
from .source import Source
from .statistics import Entry, Statistics

HEADER = 1 << 20  # bytes of the file that are no tensors


def choose_ranks(
    source: Source,
    specs: Mapping[str, LayerSpec],
    groups: Sequence[tuple[str, ...]],
    recipe: Recipe,
    statistics: Statistics | None,
) -> tuple[dict[str, LayerSpec], dict[str, str], list[str]]:
    """(specs with their final rank, layer -> why it stays in 16 bit, sentences for the report)

    Without auto_rank and target_size the plan stays as it is.
    """
    if not recipe.auto_rank and not recipe.target_size:
        return dict(specs), {}, []
    units = {}
    for group in groups:
        layers = [layer for layer in group if specs[layer].fmt.low_rank]
        entry = None if statistics is None else next(filter(None, map(statistics.entry, group)), None)
        for layer in layers:
            units[layer] = unit_of(source.tensor(f"{layer}.weight").float(), specs[layer], recipe, entry)
    room = _room(source, specs, units, recipe)
    chosen = allocate(units, room, recipe.fallback, recipe.rank)
    ranked = {
        layer: replace(spec, rank=chosen.ranks[layer]) if layer in chosen.ranks else spec
        for layer, spec in specs.items()
    }
    measured = sum(unit.sensitivity != 1 for unit in units.values())
    how = f"weighted by the measured sensitivity of {measured} layers" if measured else "all layers weighted alike"
    return ranked, dict(chosen.kept), [*chosen.notes, how]


def unit_of(weight: torch.Tensor, spec: LayerSpec, recipe: Recipe, entry: Entry | None) -> Unit:
    """What the noise model expects of this layer at each rank. Without statistics only the weight's own tail counts."""
    if entry is None or not entry.kept:
        factor = smooth.from_weight_spans(weight, recipe.smooth_power)
        # two roundings of about 1/7 of a group's extreme, whose typical ratio to its mean is 3: 0.1 in relative error
        return Unit(spec, tuple(0.01 * tail for tail in tails(weight * factor, recipe.seed)))
    tokens, _ = entry.part(hold=False)
    x = torch.cat(list(smoothed_chunks(tokens[: 4 * smooth.TOKENS], torch.ones(spec.k), spec)))
    inputs = smooth.Inputs.of(x)
    factor = smooth.from_spans(inputs.absmax, weight.abs().amax(0), 0.5, 0.5).clamp(*smooth.LIMITS)
    model = smooth.NoiseModel.of(spec, weight.device, recipe.rounds > 0)
    sample = inputs.rows @ weight.T
    noise = model.cost(factor.log(), inputs, weight) / sample.square().sum(1).mean().clamp_min(1e-30)
    ratio, times = entry.sensitivity.tolist()
    sensitivity = ratio / times if times else 1.0
    return Unit(spec, tuple(noise.item() * tail for tail in tails(weight * factor, recipe.seed)), sensitivity)


def _room(source: Source, specs: Mapping[str, LayerSpec], units: Mapping[str, Unit], recipe: Recipe) -> int:
    """Bytes for the layers with a low-rank branch: the target less everything else, or what one rank for all takes."""
    if not recipe.target_size:
        return sum(unit.bytes_at(recipe.rank) for unit in units.values())
    others = sum(info.nbytes for key, info in source.infos.items() if key.removesuffix(".weight") not in specs)
    others += sum(Unit(spec, (0.0,)).bytes_at(0) for spec in specs.values() if not spec.fmt.low_rank)
    if others + HEADER >= recipe.target_size:
        raise BudgetError(
            f"target_size is {recipe.target_size:,} bytes, and what stays in 16 bit takes {others + HEADER:,} already"
        )
    return recipe.target_size - others - HEADER
