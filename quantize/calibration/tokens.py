"""Which activations of a layer are kept while a model runs, and what is counted of all of them.

Which tokens stay is bottom-k sampling: every token draws a key, each stratum keeps its largest, and room is shared by
rank within the stratum. So every stratum that was ever seen is present, rare ones whole, and two files merge into the
one that a single longer run would have given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

BUCKETS = 8  # equal parts of a sampling run
POSITIONS = 4  # equal parts of the sequence: text comes before or after the image
HALVES = 2  # with the prompt, and the unconditional half of classifier-free guidance
HOLD_OUT = 0.1


@dataclass(frozen=True)
class ModelCall:
    """One call of the model inside a run, as the layers need to know it.

    step, steps  which step of how many; a sampler may call the model more than once per step
    halves       per batch chunk: 0 with the prompt, 1 without; batch rows are split evenly among them
    batch        rows of the model's input
    """

    step: int
    steps: int
    halves: tuple[int, ...] = (0,)
    batch: int = 1

    @property
    def bucket(self) -> int:
        return min(BUCKETS - 1, self.step * BUCKETS // max(1, self.steps))

    def strata(self, shape: Sequence[int]) -> torch.Tensor:
        """(M,) the stratum of every row of an activation of this shape (..., K)."""
        rows = math.prod(shape[:-1])
        half = torch.zeros(rows, dtype=torch.int64)
        position = torch.zeros(rows, dtype=torch.int64)
        if len(shape) > 2 and shape[0] == self.batch:
            per_image = rows // shape[0]
            image = torch.arange(rows) // per_image
            half = torch.tensor(self.halves)[image * len(self.halves) // shape[0]]
            position = torch.arange(rows) % per_image * POSITIONS // per_image
        return (self.bucket * HALVES + half.clamp(0, HALVES - 1)) * POSITIONS + position


def bucket_of(strata: torch.Tensor) -> torch.Tensor:
    return strata // (HALVES * POSITIONS)


def survivors(keys: torch.Tensor, strata: torch.Tensor, room: int) -> torch.Tensor:
    """Indices of the tokens that stay: by rank of the key within the stratum, then by key. At most `room`."""
    if len(keys) <= room:
        return torch.arange(len(keys))
    by_key = keys.argsort(descending=True, stable=True)
    order = by_key[strata[by_key].argsort(stable=True)]  # stratum by stratum, each with falling keys
    sizes = strata.bincount()
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(keys)) - first[strata[order]]
    score = rank.double() - keys.double()  # keys lie in (0, 1]
    return score.argsort(stable=True)[:room]


@dataclass
class InputStatistics:
    """The statistics of one layer, as views of the file."""

    tokens: torch.Tensor
    key: torch.Tensor
    stratum: torch.Tensor
    hold: torch.Tensor
    absmax: torch.Tensor
    square: torch.Tensor
    count: torch.Tensor
    sensitivity: torch.Tensor

    @property
    def kept(self) -> int:
        return int((self.key > 0).sum())

    def observe(self, x: torch.Tensor, call: ModelCall, generator: torch.Generator) -> bool:
        """Take in one activation (..., K). Returns False, and changes nothing, if it holds NaN or Inf."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if not len(rows):
            return True
        absmax = rows.abs().amax(0).float().cpu()
        if not absmax.isfinite().all():
            return False
        self.absmax[call.bucket] = torch.maximum(self.absmax[call.bucket], absmax)
        self.square[call.bucket] += rows.float().square().sum(0).cpu()
        self.count[call.bucket] += len(rows)
        keys = 1 - torch.rand(len(rows), generator=generator)
        hold = torch.rand(len(rows), generator=generator) < HOLD_OUT
        self._admit(keys, call.strata(x.shape), hold.to(torch.uint8), rows)
        return True

    def _admit(self, keys: torch.Tensor, strata: torch.Tensor, hold: torch.Tensor, rows: torch.Tensor) -> None:
        """Let new tokens compete for the slots; only the rows that win are copied, each into the slot of a loser."""
        used = self.key > 0
        room, old = len(self.key), self.kept
        stay = survivors(torch.cat([self.key[used], keys]), torch.cat([self.stratum[used].long(), strata]), room)
        won = stay[stay >= old] - old
        free = ~used
        free[used] = ~torch.isin(torch.arange(old), stay)
        slots = free.nonzero().flatten()[: len(won)]
        self.tokens[slots] = rows[won.to(rows.device)].to("cpu", self.tokens.dtype)
        self.key[slots], self.hold[slots] = keys[won], hold[won]
        self.stratum[slots] = strata[won].to(torch.int16)

    def merge(self, other: "InputStatistics") -> None:
        """As if this entry had seen what the other one saw."""
        self.absmax.copy_(torch.maximum(self.absmax, other.absmax))
        self.square += other.square
        self.count += other.count
        self.sensitivity += other.sensitivity
        there = other.key > 0
        self._admit(other.key[there], other.stratum[there].long(), other.hold[there], other.tokens[there])

    def part(self, hold: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens (M, K), step bucket (M,)) of the hold-out part, or of the part to fit to."""
        chosen = (self.key > 0) & (self.hold == int(hold))
        return self.tokens[chosen], bucket_of(self.stratum[chosen].long())

    def channel_absmax(self) -> torch.Tensor:
        return self.absmax.amax(0)

    def channel_square(self) -> torch.Tensor:
        """(K,) mean square with every step bucket counted alike."""
        seen = self.count > 0
        return (self.square[seen] / self.count[seen, None]).mean(0) if seen.any() else self.square[0]
