"""One patch of a weight as its file gives it, whatever host has read it: a term of W' = W + sum_i strength_i * delta_i.

What a delta is made of decides how it gets into factored form:

    LoraFactors     columns, exact (LoRA, LoCon)
    LohaFactors     columns, exact up to a rank (LoHa)
    LokrFactors     a Kronecker product, or columns where those are few; exact (LoKr)
    DenseDelta      the nearest columns, made once for all strengths (full changes of a weight)
    WeightFunction  the nearest columns of f(W) - W at this very strength (set, OFT, BOFT, GLoRA)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...kernels.layer import RANK_TILE
from .deltas import LARGEST, Delta, LoraError, Offset, columns_of, plain
from .fit import LoraLimits, hadamard, kronecker

Rows = Callable[[torch.Tensor], torch.Tensor]
"""A rearrangement of a matrix's rows"""


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """delta = alpha * move_rows(up) @ mid @ down

    up         (n, r), down (r, k), mid (r, r) or None
    alpha      the file's alpha over r
    magnitude  of a DoRA, see `fit.dora`
    new_shape  of a LoRA that widens its weight
    """

    up: torch.Tensor
    down: torch.Tensor
    mid: torch.Tensor | None
    alpha: float
    magnitude: torch.Tensor | None
    new_shape: Sequence[int] | None
    move_rows: Rows | None

    @property
    def is_plain(self) -> bool:
        """Whether it is up @ down and nothing more."""
        extras = (self.mid, self.magnitude, self.new_shape, self.move_rows)
        return all(extra is None for extra in extras)

    def matrices(self, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(up, down) without alpha. Raises LoraError if it is for a weight of another shape than (N, K)."""
        up, down = self.up, self.down
        if self.new_shape is not None and tuple(self.new_shape) != shape:
            raise LoraError(
                f"the LoRA widens the weight from {shape} to {tuple(self.new_shape)}; a 4-bit weight is fixed"
            )
        if self.mid is not None:
            down = plain(self.mid).float() @ plain(down).float()
        if self.move_rows is not None:
            up = self.move_rows(plain(up))
        return up, down


@dataclass(frozen=True, eq=False)
class LohaFactors:
    """delta = alpha * (a1 @ b1) * (a2 @ b2), first = (a1, b1), second = (a2, b2)"""

    first: tuple[torch.Tensor, torch.Tensor]
    second: tuple[torch.Tensor, torch.Tensor]
    alpha: float
    magnitude: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class LokrFactors:
    """delta = alpha * kron(left, right), each one matrix or two to multiply; None where the file lacks one"""

    left: tuple[torch.Tensor | None, ...]
    right: tuple[torch.Tensor | None, ...]
    alpha: float
    magnitude: torch.Tensor | None

    def matrices(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """(left, right). Raises LoraError if one is not there."""
        left, right = (tuple(one for one in side if one is not None) for side in (self.left, self.right))
        if (len(left), len(right)) != (len(self.left), len(self.right)):
            raise LoraError("the LoKr file lacks a factor of this layer")
        return left, right


@dataclass(frozen=True, eq=False)
class DenseDelta:
    """delta (N, K) at strength 1 by the host's own arithmetic

    of            (zeros (N, K), W or None) -> delta
    reads_weight  whether it needs the model's own weight W (N, K) float32, as it is without any patch
    """

    of: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    reads_weight: bool


@dataclass(frozen=True, eq=False)
class WeightFunction:
    """W' = f(W), strength included, of the weight as the patches before have left it; may write into its argument"""

    of: Callable[[torch.Tensor], torch.Tensor]


Factors = LoraFactors | LohaFactors | LokrFactors


@dataclass(frozen=True, eq=False)
class Term:
    """W' = own * W + strength * delta, in the rows or columns of `offset`

    source    the host's object, by which a report finds the term again
    kind      what messages call it
    identity  equal for two terms that differ in strength and own alone
    tensors   the file's: what is made of them is kept for as long as they live
    own       factor of the model's own weight, 1 for every LoRA
    form      what the delta is made of; None where only `own` acts
    """

    source: object
    kind: str
    identity: tuple[object, ...]
    tensors: Sequence[torch.Tensor]
    strength: float
    own: float
    offset: Offset | None
    form: Factors | DenseDelta | WeightFunction | None


def check_numbers(term: Term) -> None:
    """Raise LoraError for a strength or alpha that is NaN, infinite or so large that outputs of the layer would be."""
    numbers = {"strength": term.strength, "strength of the model": term.own}
    if isinstance(term.form, LoraFactors | LohaFactors | LokrFactors):
        numbers["alpha over its rank"] = term.form.alpha
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise LoraError(f"the {name} is {number}: NaN or infinite, needed a finite number")
        if abs(number) > LARGEST:
            raise LoraError(f"the {name} is {number:.3g}, at most {LARGEST:.0e} is used")


def factored(group: Sequence[Term], shape: tuple[int, int], limits: LoraLimits) -> tuple[Delta, float]:
    """(delta of terms that share a block, without alpha; share of its energy that is kept) on an (N, K) weight"""
    first, *_ = group
    form = first.form
    if isinstance(form, LohaFactors):
        return hadamard(form.first, form.second, first.offset, shape, limits)
    if isinstance(form, LokrFactors):
        return kronecker(*form.matrices(), first.offset, shape), 1.0
    forms = [(term.form, term.offset) for term in group]
    return columns_of([(*f.matrices(shape), o) for f, o in forms if isinstance(f, LoraFactors)], shape), 1.0


def grouped(terms: Sequence[Term]) -> list[list[Term]]:
    """Terms in order; LoRAs of a few columns for neighbouring slices share one block of them.

    A block is a multiple of RANK_TILE columns wide and has one strength: q, k and v at rank 4 take 16 columns, not 48.
    """
    groups: list[list[Term]] = []
    for term in terms:
        if groups and _may_join(groups[-1], term):
            groups[-1].append(term)
        else:
            groups.append([term])
    return groups


def _may_join(group: list[Term], term: Term) -> bool:
    block = _block_of(term)
    if block is None or block != _block_of(group[0]):
        return False
    return all(_lie_apart(member.offset, term.offset) for member in group)


def _block_of(term: Term) -> tuple[float, float, int] | None:
    """(strength, alpha, dim) of a slice's LoRA of a few columns, what a block has one of; None for any other term"""
    form = term.form
    if not isinstance(form, LoraFactors) or not form.is_plain or term.offset is None or term.own != 1:
        return None
    return None if form.down.shape[0] % RANK_TILE == 0 else (term.strength, form.alpha, term.offset[0])


def _lie_apart(one: Offset | None, other: Offset | None) -> bool:
    """Whether two slices of one dimension do not overlap."""
    return one is not None and other is not None and max(one[1], other[1]) >= min(sum(one[1:]), sum(other[1:]))
