"""Second step, decide: how wide each layer's low-rank branch is, and which layers need more bits than the others.

The output error of a layer of rank r is nearly proportional to what the branch leaves over, so its square falls like
the sum of the squared singular values from r on. Source of the greedy rule: SRR and LoRaQ, arXiv 2604.18117.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch

from ...kernels.layer import MEANS, RANK_TILE, LayerSpec
from ..calibration.file import Statistics, StatisticsError
from ..calibration.tokens import InputStatistics
from ..files.checkpoint import header_room
from ..files.source import Source
from ..maths import lowrank
from ..maths.smooth import ExpectedNoise, from_weight_spans
from ..recipe import LARGEST_AUTO_RANK, Recipe
from .plan import Plan, QuantizeError

RANKS = range(0, LARGEST_AUTO_RANK + 1, RANK_TILE)  # among which a budget chooses
TIMES_MEDIAN = 5  # a layer that costs the model so many times what the median layer does is one of the worst
HEADER = 1 << 20  # bytes of the file that are no tensors, at least
NOISE_LEFT = (7 / 127) ** 2  # of rounding an activation, when codes up to 127 take the place of codes up to 7
DATA_FREE_ERROR = 0.01  # two roundings of about 1/7 of a group's extreme, whose typical ratio to its mean is 3, squared


class BudgetError(ValueError):
    """A size cannot be met. The message says which can."""


@dataclass(frozen=True)
class Decisions:
    """What was decided about a plan before a layer is made.

    specs  with final rank and activation bits
    kept   layer -> why it stays in 16 bit
    eight  layer -> why its activations get 8 bit
    notes  sentences for the report
    """

    plan: Plan
    specs: Mapping[str, LayerSpec]
    kept: Mapping[str, str] = field(default_factory=dict)
    eight: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def decide(plan: Plan, source: Source, recipe: Recipe, statistics: Statistics | None) -> Decisions:
    """Measure every layer once, then decide. Without auto_rank, target_size and fallback the plan stays as it is.

    raises  QuantizeError for a recipe that needs statistics without them; StatisticsError for those of another model;
            BudgetError
    """
    _check_statistics(plan, source.name, recipe, statistics)
    ranked = recipe.auto_rank or recipe.target_size > 0
    eight_bit = recipe.fallback > 0 and statistics is not None
    if not ranked and not eight_bit:
        return Decisions(plan, plan.specs)
    units: dict[str, Unit] = {}  # by the first of the layers that share a branch
    members: dict[str, tuple[str, ...]] = {}
    for group in plan.groups:
        inputs = None if statistics is None else statistics.of_group(group)
        for layers in plan.branches(group):
            if plan.specs[layers[0]].fmt.low_rank:
                units[layers[0]] = _unit_of_branch(plan, layers, source, recipe, inputs)
                members[layers[0]] = layers
    eight = eight_bits(units, plan.groups, recipe.fallback, recipe.act8_share, recipe.rank) if eight_bit else {}
    units |= {layer: units[layer].with_8bit_activations() for layer in eight}
    specs = dict(plan.specs)
    for first, layers in members.items():
        specs |= {layer: replace(specs[layer], act_bits=units[first].spec.act_bits) for layer in layers}
    if not ranked:
        return Decisions(plan, specs, {}, _for_all(eight, members))
    allocation = allocate(units, _room(source, plan.specs, units, recipe), recipe.fallback, recipe.rank)
    for first, rank in allocation.ranks.items():
        specs |= {layer: replace(specs[layer], rank=rank) for layer in members[first]}
    measured = sum(unit.sensitivity != 1 for unit in units.values())
    how = f"weighted by the measured sensitivity of {measured} layers" if measured else "all layers weighted alike"
    eight = {layer: reason for layer, reason in eight.items() if layer not in allocation.kept}
    kept = _for_all(allocation.kept, members)
    return Decisions(plan, specs, kept, _for_all(eight, members), (*allocation.notes, how))


def _for_all(reasons: Mapping[str, str], members: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What was decided of a branch, for every layer that has it."""
    return {layer: reason for first, reason in reasons.items() for layer in members[first]}


def _unit_of_branch(
    plan: Plan, layers: Sequence[str], source: Source, recipe: Recipe, inputs: InputStatistics | None
) -> "Unit":
    """Layers that share a branch as the budget sees them: one, with their outputs side by side"""
    specs = [plan.specs[layer] for layer in layers]
    weight = torch.cat([source.tensor(f"{layer}.weight").float() for layer in layers])
    unit = unit_of(weight, replace(specs[0], n=len(weight)), recipe, inputs)
    return replace(unit, members=tuple(specs)) if len(specs) > 1 else unit


def _check_statistics(plan: Plan, model: str, recipe: Recipe, statistics: Statistics | None) -> None:
    if statistics is None:
        if recipe.needs_data:
            raise QuantizeError(
                f"recipe {recipe.name} needs statistics: run SVDQuant Calibrate with this model, or use fast"
            )
        return
    found = 0
    for group in plan.groups:
        inputs = statistics.of_group(group)
        if inputs is None:
            continue
        found += 1
        wanted, width = plan.specs[group[0]].k, inputs.tokens.shape[1]
        if width != wanted:
            raise StatisticsError(
                f"{statistics.path.name}: {group[0]} has {width} input channels there and {wanted} in {model}: these "
                "are statistics of another model"
            )
    if not found:
        raise StatisticsError(
            f"{statistics.path.name}: holds none of the layers of {model}: statistics of another model"
        )


@dataclass(frozen=True)
class Unit:
    """One low-rank branch as the budget sees it, and the layer that it belongs to.

    error        squared relative output error to expect at each rank 0, 16, ..., 128
    sensitivity  how much the model's output suffers per squared relative error; 1 for all where it is not known
    error8       `error` with 8-bit activations, None where nothing is known of the activations
    members      the layers, where several share the branch; `spec` is then of all of them side by side
    """

    spec: LayerSpec
    error: tuple[float, ...]
    sensitivity: float = 1.0
    error8: tuple[float, ...] | None = None
    members: tuple[LayerSpec, ...] = ()

    @property
    def layers(self) -> int:
        return max(1, len(self.members))

    @property
    def products(self) -> int:
        """Multiply-adds per token."""
        return self.spec.n * self.spec.k

    def bytes_at(self, rank: int) -> int:
        """Bytes of the stored layers at most, means included; each holds its proj_down, shared or not."""
        return sum(spec.fmt.nbytes(spec.n, spec.k, rank, MEANS) for spec in self.members or (self.spec,))

    def with_8bit_activations(self) -> "Unit":
        assert self.error8 is not None
        return replace(self, spec=replace(self.spec, act_bits=8), error=self.error8)


def unit_of(weight: torch.Tensor, spec: LayerSpec, recipe: Recipe, inputs: InputStatistics | None) -> Unit:
    """What the noise model expects of this layer at each rank. Without statistics only the weight's own tail counts."""
    if inputs is None or not inputs.kept:
        smooth = from_weight_spans(weight, recipe.smooth_power)
        return Unit(spec, tuple(DATA_FREE_ERROR * tail for tail in lowrank.tails(weight * smooth, RANKS, recipe.seed)))
    noise = ExpectedNoise.of(weight, inputs.part(hold=False)[0], spec, gptq=recipe.rounds > 0)
    ratio, times = inputs.sensitivity.tolist()
    left = lowrank.tails(weight * noise.smooth, RANKS, recipe.seed)
    error, error8 = (
        tuple(part.item() * tail for tail in left)
        for part in (noise.total, noise.total - (1 - NOISE_LEFT) * noise.activation)
    )
    return Unit(spec, error, ratio / times if times else 1.0, error8)


def eight_bits(
    units: Mapping[str, Unit], groups: Sequence[Sequence[str]], fallback: float, share: float, rank: int
) -> dict[str, str]:
    """layer -> why its activations get 8 bit: where that takes off most weighted squared error per multiply-add

    8-bit activations take no bytes, and time only where 4-bit products are faster. A group, which rounds its activation
    once, is looked at if one of its layers has a relative error above `fallback` at `rank`, or a weighted squared one
    above 5 times the median.

    share  of the multiply-adds of all units that may be chosen
    """
    place = min(rank, LARGEST_AUTO_RANK) // RANK_TILE
    known = {layer: (unit, unit.error8[place]) for layer, unit in units.items() if unit.error8 is not None}
    losses = {layer: unit.sensitivity * unit.error[place] for layer, (unit, _) in known.items()}
    typical = median(losses.values()) if losses else 0.0
    offers = []
    for group in groups:
        layers = [layer for layer in group if layer in known]
        reasons = {}
        for layer in layers:
            error, times = known[layer][0].error[place] ** 0.5, losses[layer] / typical if typical else 0.0
            if error > fallback:
                reasons[layer] = f"predicted error {error:.3f} at rank {place * RANK_TILE} is above {fallback:g}"
            elif times > TIMES_MEDIAN:
                reasons[layer] = f"predicted to cost the model {times:.1f} times what the median layer costs it"
        cost = sum(known[layer][0].products for layer in layers)
        saved = sum(losses[layer] - known[layer][0].sensitivity * known[layer][1] for layer in layers)
        if reasons and saved > 0:
            worst = next(iter(reasons))
            reasons = {layer: reasons.get(layer, f"reads the activation of {worst}") for layer in layers}
            offers.append((saved / cost, cost, reasons))
    left = share * sum(unit.products for unit in units.values())
    chosen: dict[str, str] = {}
    for _, cost, reasons in sorted(offers, key=lambda offer: -offer[0]):
        if cost <= left:
            left -= cost
            chosen |= reasons
    return chosen


@dataclass(frozen=True)
class Allocation:
    """What was decided: rank per layer, layers kept in 16 bit with the reason, bytes of all units, and sentences."""

    ranks: Mapping[str, int]
    kept: Mapping[str, str]
    bytes: int
    notes: Sequence[str]


def allocate(units: Mapping[str, Unit], room: int, fallback: float = 0.0, uniform: int = 32) -> Allocation:
    """Spend `room` bytes on the layers: first those that cannot be 4-bit, then rank where a byte gains most

    fallback  relative error at rank `uniform` above which a layer stays in 16 bit, worst first, as long as room
              lasts; 0 for none
    raises    BudgetError if not even rank 0 fits
    """
    least = {layer: unit.bytes_at(0) for layer, unit in units.items()}
    spent = sum(least.values())
    if spent > room:
        raise BudgetError(
            f"the 4-bit layers take at least {spent:,} bytes and {room:,} are left for them: raise target_size by "
            f"{spent - room:,} or more"
        )
    kept: dict[str, str] = {}
    step = min(uniform, LARGEST_AUTO_RANK) // RANK_TILE
    for layer, unit in sorted(units.items(), key=lambda item: -item[1].error[step] * item[1].sensitivity):
        error = unit.error[step] ** 0.5
        more = unit.spec.bytes_16bit() - least[layer]
        if fallback and error > fallback and spent + more <= room:
            even = ", with 8-bit activations too" if unit.spec.act_bits == 8 else ""
            kept[layer] = f"predicted error {error:.3f} at rank {step * RANK_TILE} is above {fallback:g}{even}"
            spent += more
    ranks = {layer: 0 for layer in units if layer not in kept}
    while (best := _best(units, ranks, room - spent)) is not None:
        spent += _cost(units[best], ranks[best])
        ranks[best] += RANK_TILE
    counts: Counter[int] = Counter()
    for layer, rank in ranks.items():
        counts[rank] += units[layer].layers
    notes = [
        f"{room:,} bytes for {sum(unit.layers for unit in units.values())} layers, {spent:,} used",
        "ranks " + ", ".join(f"{count} x {rank}" for rank, count in sorted(counts.items())),
    ]
    if kept:
        notes.append(f"{sum(units[layer].layers for layer in kept)} layers stay in 16 bit")
    return Allocation(ranks, kept, spent, notes)


def _cost(unit: Unit, rank: int) -> int:
    return unit.bytes_at(rank + RANK_TILE) - unit.bytes_at(rank)


def _best(units: Mapping[str, Unit], ranks: Mapping[str, int], left: int) -> str | None:
    """The layer where 16 columns more gain most per byte, None when none fits or gains."""
    best: str | None = None
    gain = 0.0
    for layer, rank in ranks.items():
        unit, place = units[layer], rank // RANK_TILE
        if place + 1 >= len(unit.error):
            continue
        cost = _cost(unit, rank)
        value = unit.sensitivity * (unit.error[place] - unit.error[place + 1]) / cost
        if cost <= left and value > gain:
            best, gain = layer, value
    return best


def _room(source: Source, specs: Mapping[str, LayerSpec], units: Mapping[str, Unit], recipe: Recipe) -> int:
    """Bytes for the layers with a low-rank branch: the target less everything else, or what one rank for all takes."""
    if not recipe.target_size:
        return sum(unit.bytes_at(recipe.rank) for unit in units.values())
    others = sum(info.nbytes for key, info in source.infos.items() if key.removesuffix(".weight") not in specs)
    others += sum(Unit(spec, (0.0,)).bytes_at(0) for spec in specs.values() if not spec.fmt.low_rank)
    others += max(HEADER, header_room(specs.values(), len(source.infos)))
    if others >= recipe.target_size:
        raise BudgetError(
            f"target_size is {recipe.target_size:,} bytes, and what stays in 16 bit takes {others:,} already"
        )
    return recipe.target_size - others
