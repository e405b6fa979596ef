"""The terms of one 4-bit layer, applied one after another to what they make of its weight.

    W' = diag(rows) W diag(cols) + sum_i scale_i * delta_i

The 4-bit weight W stays as it is: what changes are two vectors and the deltas beside it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from ...kernels.layer import Layer
from ..linear import PackedLinear
from .deltas import Delta, LoraError, Offset, check_finite, span
from .fit import Dora, LoraLimits, dora, fit
from .loras import LayerLoras
from .store import FactorStore
from .terms import DenseDelta, Factors, Term, WeightFunction, check_numbers, factored, grouped


class Note(NamedTuple):
    """What became of one term, for the report: its kind, columns that it takes, share of its energy that they hold."""

    source: object
    kind: str
    columns: int
    kept: float
    milliseconds: float


@dataclass(frozen=True, eq=False)
class FactoredTerm:
    """A term in factored form at strength 1, without alpha. kept: share of its energy that the delta holds."""

    delta: Delta
    kept: float
    milliseconds: float


@dataclass
class PatchedWeight:
    """W' of one layer, for as far as terms have been applied.

    key     name of the layer in `store`
    packed  the layer, its bytes in `blob`
    device  where dense weights are computed, when a term needs them
    notes   what became of each term
    """

    key: str
    packed: PackedLinear
    blob: torch.Tensor
    store: FactorStore
    limits: LoraLimits
    device: torch.device
    notes: list[Note] = field(init=False, default_factory=list)
    _deltas: list[Delta] = field(init=False, default_factory=list)
    _scales: list[float] = field(init=False, default_factory=list)
    _rows: torch.Tensor | None = field(init=False, default=None)
    _cols: torch.Tensor | None = field(init=False, default=None)
    _history: tuple[object, ...] = field(init=False, default=())  # what the weight at this point depends on

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.spec.n, self.packed.spec.k

    def loras(self, terms: Sequence[Term]) -> LayerLoras | None:
        """All terms together; None if they change nothing. Raises LoraError naming the kind of patch that cannot be."""
        for group in grouped(terms):
            try:
                self._apply(group)
            except LoraError as error:
                raise LoraError(f"the patch of kind {group[0].kind!r}: {error}") from error
        if not self._deltas and self._rows is None and self._cols is None:
            return None
        shift = None
        if self._rows is not None and self.packed.spec.act_unsigned != (0, 0):
            unshifted = self._layer().unshifted_bias(torch.zeros(self.shape[0], device=self.device))
            shift = _on_cpu(unshifted)
        return LayerLoras(tuple(self._deltas), tuple(self._scales), _on_cpu(self._rows), _on_cpu(self._cols), shift)

    def _apply(self, group: list[Term]) -> None:
        term, form = group[0], group[0].form
        check_numbers(term)
        if term.own != 1:
            self._scale(term.own, term.offset)
        if isinstance(form, DenseDelta):
            self._add(term, term.strength, self._get(group, None, partial(self._fit_at_strength_1, form)))
        elif isinstance(form, WeightFunction):
            self._add(term, 1.0, self._get(group, (self._history, term.strength), partial(self._fit_in_place, form)))
        elif form is not None:
            self._apply_factors(group, form)
        self._history += tuple((member.identity, member.strength, member.own) for member in group)

    def _get(self, group: list[Term], context: object, make: Callable[[], tuple[Delta, float]]) -> FactoredTerm:
        key = (self.key, *(member.identity for member in group))
        sources = [tensor for member in group for tensor in member.tensors]
        return self.store.get(key, (self.limits, context), sources, partial(_timed, make))

    def _add(self, term: Term, scale: float, made: FactoredTerm) -> None:
        self._deltas.append(made.delta)
        self._scales.append(scale)
        self.notes.append(Note(term.source, term.kind, made.delta.rank, made.kept, made.milliseconds))

    def _apply_factors(self, group: list[Term], form: Factors) -> None:
        term = group[0]
        factors = self._get(group, None, partial(factored, group, self.shape, self.limits))
        if form.magnitude is not None:
            # W + s * (diag(m) (W + delta) - W) = diag(1 + s (m - 1)) W + s * diag(m) delta
            key, make = (self.key, "DoRA", term.identity), partial(self._dora, term, form, factors)
            vectors, factors = self.store.get(key, (self.limits, self._history), term.tensors, make)
            self._rescale(*(None if m is None else 1 + term.strength * (m - 1) for m in (vectors.rows, vectors.cols)))
        self._add(term, term.strength * form.alpha, factors)
        for member in group[1:]:
            self.notes.append(Note(member.source, member.kind, 0, factors.kept, 0.0))

    def _dora(self, term: Term, form: Factors, factors: FactoredTerm) -> tuple[Dora, FactoredTerm]:
        """(magnitude over norm, diag(rows) delta diag(cols))"""
        assert form.magnitude is not None
        if not form.magnitude.dim():
            raise LoraError("its DoRA magnitude is one number, needed one for each row or column")
        delta = None
        if form.magnitude.shape[0] == 1:
            rows, cols = span(term.offset, self.shape)
            whole = factors.delta.dense(*self.shape).to(self.device) * form.alpha
            delta = whole[rows[0] : sum(rows), cols[0] : sum(cols)]
        check_finite(form.magnitude)
        vectors = dora(form.magnitude, self._weight(), delta, term.offset)
        vectors = Dora(_on_cpu(vectors.rows), _on_cpu(vectors.cols))
        bent = factors.delta.scaled(vectors.rows, vectors.cols)
        return vectors, FactoredTerm(bent, factors.kept, factors.milliseconds)

    def _scale(self, factor: float, offset: Offset | None) -> None:
        """Multiply the weight as it is now by a number, in the rows or columns of `offset`."""
        dim = 1 if offset is not None and offset[0] == 1 else 0
        start, length = span(offset, self.shape)[dim]
        vector = torch.ones(self.shape[dim])
        vector[start : start + length] = factor
        self._rescale(*((vector, None) if dim == 0 else (None, vector)))

    def _rescale(self, rows: torch.Tensor | None, cols: torch.Tensor | None) -> None:
        self._deltas = [delta.scaled(rows, cols) for delta in self._deltas]
        if rows is not None:
            self._rows = rows if self._rows is None else self._rows * rows
        if cols is not None:
            self._cols = cols if self._cols is None else self._cols * cols

    def _layer(self) -> Layer:
        return self.packed.layer(self.blob.detach().to(self.device))

    def _weight(self) -> torch.Tensor:
        """The dense weight as it is now, (N, K) float32."""
        loras = LayerLoras(tuple(self._deltas), tuple(self._scales), self._rows, self._cols)
        return loras.dense_weight(self._layer().dense_weight())

    def _fit_at_strength_1(self, form: DenseDelta) -> tuple[Delta, float]:
        original = self._layer().dense_weight() if form.reads_weight else None
        return fit(form.of(torch.zeros(self.shape, device=self.device), original), self.limits)

    def _fit_in_place(self, form: WeightFunction) -> tuple[Delta, float]:
        weight = self._weight()
        return fit(form.of(weight.clone()) - weight, self.limits)


def _timed(make: Callable[[], tuple[Delta, float]]) -> FactoredTerm:
    start = time.perf_counter()
    delta, kept = make()
    return FactoredTerm(delta, kept, 1e3 * (time.perf_counter() - start))


def _on_cpu(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.cpu()
