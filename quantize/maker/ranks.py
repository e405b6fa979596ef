"""Apply a recipe's budget to a plan: measure every layer once, then let the budget decide."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ...kernels.layer import LayerSpec
from ..calibration.file import Statistics
from ..calibration.tokens import Entry
from ..files.source import Source
from ..maths import smooth
from ..maths.moments import smoothed_chunks
from ..recipe import Recipe
from .budget import BudgetError, Unit, allocate, eight_bits, tails

HEADER = 1 << 20  # bytes of the file that are no tensors
NOISE_LEFT = (7 / 127) ** 2  # of rounding an activation, when codes up to 127 take the place of codes up to 7


@dataclass(frozen=True)
class Chosen:
    """specs with their final rank and activation bits; layer -> why it stays in 16 bit; layer -> why its activations
    get 8 bit; sentences for the report
    """

    specs: dict[str, LayerSpec]
    kept: dict[str, str] = field(default_factory=dict)
    eight: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def choose_ranks(
    source: Source,
    specs: Mapping[str, LayerSpec],
    groups: Sequence[tuple[str, ...]],
    recipe: Recipe,
    statistics: Statistics | None,
) -> Chosen:
    """Measure every layer once, then decide. Without auto_rank, target_size and fallback the plan stays as it is."""
    ranked = recipe.auto_rank or recipe.target_size > 0
    eight_bit = recipe.fallback > 0 and statistics is not None
    if not ranked and not eight_bit:
        return Chosen(dict(specs))
    units = {}
    for group in groups:
        layers = [layer for layer in group if specs[layer].fmt.low_rank]
        entry = None if statistics is None else next(filter(None, map(statistics.entry, group)), None)
        for layer in layers:
            units[layer] = unit_of(source.tensor(f"{layer}.weight").float(), specs[layer], recipe, entry)
    eight = eight_bits(units, groups, recipe.fallback, recipe.act8_share, recipe.rank) if eight_bit else {}
    for layer in eight:
        unit = units[layer]
        units[layer] = replace(unit, spec=replace(unit.spec, act_bits=8), error=unit.error8)
    final = {**specs, **{layer: unit.spec for layer, unit in units.items()}}
    if not ranked:
        return Chosen(final, {}, eight)
    found = allocate(units, _room(source, specs, units, recipe), recipe.fallback, recipe.rank)
    final |= {layer: replace(final[layer], rank=rank) for layer, rank in found.ranks.items()}
    measured = sum(unit.sensitivity != 1 for unit in units.values())
    how = f"weighted by the measured sensitivity of {measured} layers" if measured else "all layers weighted alike"
    eight = {layer: reason for layer, reason in eight.items() if layer not in found.kept}
    return Chosen(final, dict(found.kept), eight, [*found.notes, how])


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
    power = sample.square().sum(1).mean().clamp_min(1e-30)
    noise = model.cost(factor.log(), inputs, weight) / power
    of_act = replace(model, weight_gain=0.0).cost(factor.log(), inputs, weight) / power
    ratio, times = entry.sensitivity.tolist()
    sensitivity = ratio / times if times else 1.0
    left = tails(weight * factor, recipe.seed)
    error, error8 = (tuple(part.item() * tail for tail in left) for part in (noise, noise - (1 - NOISE_LEFT) * of_act))
    return Unit(spec, error, sensitivity, error8)


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
