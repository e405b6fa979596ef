"""Bytes for rank: how wide each layer's low-rank branch is, and which layers need more bits than the others.

The output error of a layer of rank r is nearly proportional to what the branch leaves over, so its square falls like
the sum of the squared singular values from r on. Source of the greedy rule: SRR and LoRaQ, arXiv 2604.18117.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...kernels.layer import MEANS, RANK_TILE, LayerSpec
from ..maths.lowrank import OVERSAMPLING, randomized_svd
from ..recipe import LARGEST_AUTO_RANK

TIMES_MEDIAN = 5  # a layer that costs the model so many times what the median layer does is one of the worst


class BudgetError(ValueError):
    """A size cannot be met. The message says which can."""


@dataclass(frozen=True)
class Unit:
    """One layer as the budget sees it.

    error        squared relative output error to expect at each rank 0, 16, ..., 128
    sensitivity  how much the model's output suffers per squared relative error; 1 for all where it is not known
    error8       `error` with 8-bit activations, None where nothing is known of the activations
    """

    spec: LayerSpec
    error: tuple[float, ...]
    sensitivity: float = 1.0
    error8: tuple[float, ...] | None = None

    @property
    def products(self) -> int:
        """Multiply-adds per token."""
        return self.spec.n * self.spec.k

    def bytes_at(self, rank: int) -> int:
        """Bytes of the stored layer at most; 16-bit tensors are counted as such, and means as if it had them."""
        parts = self.spec.fmt.parts(self.spec.n, self.spec.k, rank)
        size = 0
        for name, part in parts.items():
            if not part.optional or name in MEANS:
                dtype = torch.bfloat16 if torch.bfloat16 in part.dtypes else part.dtypes[0]
                size += torch.Size(part.shape).numel() * dtype.itemsize
        return size


def tails(weight: torch.Tensor, seed: int) -> tuple[float, ...]:
    """||W - SVD_r(W)||^2 / ||W||^2 for r = 0, 16, ..., 128, from one randomized SVD. weight (N, K), smoothed."""
    most = min(LARGEST_AUTO_RANK, *weight.shape)
    if most + OVERSAMPLING >= min(weight.shape) // 2:
        values = torch.linalg.svdvals(weight)
    else:
        values = randomized_svd(weight, most + OVERSAMPLING, 2, seed)[1]
    total = weight.double().square().sum().clamp_min(1e-300)
    gone = torch.cat([torch.zeros(1, dtype=torch.float64, device=weight.device), values.double().square().cumsum(0)])
    ranks = range(0, LARGEST_AUTO_RANK + 1, RANK_TILE)
    return tuple(max(0.0, 1 - (gone[min(rank, len(gone) - 1)] / total).item()) for rank in ranks)


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
    known = {layer: unit for layer, unit in units.items() if unit.error8 is not None}
    losses = {layer: unit.sensitivity * unit.error[place] for layer, unit in known.items()}
    median = statistics.median(losses.values()) if losses else 0.0
    offers = []
    for group in groups:
        layers = [layer for layer in group if layer in known]
        reasons = {}
        for layer in layers:
            error, times = known[layer].error[place] ** 0.5, losses[layer] / median if median else 0.0
            if error > fallback:
                reasons[layer] = f"predicted error {error:.3f} at rank {place * RANK_TILE} is above {fallback:g}"
            elif times > TIMES_MEDIAN:
                reasons[layer] = f"predicted to cost the model {times:.1f} times what the median layer costs it"
        cost = sum(known[layer].products for layer in layers)
        saved = sum(losses[layer] - known[layer].sensitivity * known[layer].error8[place] for layer in layers)
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
    while True:
        layer = _best(units, ranks, room - spent)
        if layer is None:
            break
        spent += _cost(units[layer], ranks[layer])
        ranks[layer] += RANK_TILE
    notes = [
        f"{room:,} bytes for {len(units)} layers, {spent:,} used",
        "ranks " + ", ".join(f"{count} x {rank}" for rank, count in sorted(_histogram(ranks.values()).items())),
    ]
    if kept:
        notes.append(f"{len(kept)} layers stay in 16 bit")
    return Allocation(ranks, kept, spent, notes)


def _cost(unit: Unit, rank: int) -> int:
    return unit.bytes_at(rank + RANK_TILE) - unit.bytes_at(rank)


def _best(units: Mapping[str, Unit], ranks: Mapping[str, int], left: int) -> str | None:
    """The layer where 16 columns more gain most per byte, None when none fits or gains."""
    best, gain = None, 0.0
    for layer, rank in ranks.items():
        unit, place = units[layer], rank // RANK_TILE
        if place + 1 >= len(unit.error):
            continue
        cost = _cost(unit, rank)
        value = unit.sensitivity * (unit.error[place] - unit.error[place + 1]) / cost
        if cost <= left and value > gain:
            best, gain = layer, value
    return best


def _histogram(values: Sequence[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return found
