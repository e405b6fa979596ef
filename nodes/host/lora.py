"""Bridge: the host's patches of a 4-bit layer -> the layer's Branch.

Every patch becomes one of four things; what fits none of them is refused by name:

    exact columns     LoRA with alpha, mid, slices and row functions; LoHa; GLoRA-like patches of low rank
    Kronecker         LoKr
    factors of W      DoRA, patches that scale the model's own weight
    nearest columns   diff, set, OFT, BOFT, GLoRA: the host's own arithmetic on the dense weight, then an SVD
"""

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter

from ...quantize.lora.branch import Branch
from ...quantize.lora.fit import Dora, LoraLimits, dora, fit, hadamard, kronecker
from ...quantize.lora.terms import Columns, Kron, LoraError, Offset, columns_of, plain, span
from .linear import SVDQuantLinear
from .patch import MERGE, Patch, alpha_factor, grouped, host_weight, is_exact, is_linear, lora_extras, magnitude_of


class Made(NamedTuple):
    """A patch in factored form at strength 1. factor: what strength is multiplied with; kept: energy of the delta."""

    part: Columns | Kron
    factor: float
    kept: float
    milliseconds: float


class Plan(NamedTuple):
    """A layer whose patches are plain LoRAs: what they are, their parts, alpha / rank of each."""

    loras: tuple[Any, ...]
    parts: tuple[Columns | Kron, ...]
    factors: tuple[float, ...]


class PartStore:
    """Factored patches of one model, shared by all clones; an entry dies with the LoRA file's tensors.

    Strength is no part of an entry, so that a change of strength makes nothing anew.
    """

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Any, Any, list[weakref.ref]]] = {}
        self.plans: dict[str, Plan] = {}

    def __len__(self) -> int:
        return len(self._made)

    def remember(self, key: str, plan: Plan, sources: Sequence[torch.Tensor]) -> None:
        """Keep the plan of a layer for as long as its file is there."""
        self.plans[key] = plan
        self.get((key, "plan"), plan.loras, sources, lambda: None)

    def get(self, key: Any, context: Any, sources: Sequence[torch.Tensor], make: Callable[[], Any]) -> Any:
        """What `make` gave for this key and context; of several contexts only the last is kept."""
        found = self._made.get(key)
        if found is not None and found[0] == context:
            return found[1]
        made = make()
        forget = partial(_forget, weakref.ref(self), key)
        self._made[key] = context, made, [weakref.ref(tensor, forget) for tensor in sources]
        return made


def _forget(store: "weakref.ref[PartStore]", key: Any, _: weakref.ref) -> None:
    alive = store()
    if alive is not None:
        alive._made.pop(key, None)
        if key[1:] == ("plan",):
            alive.plans.pop(key[0], None)


class Note(NamedTuple):
    """What became of one patch, for the report."""

    value: Any
    kind: str
    columns: int
    kept: float
    milliseconds: float


@dataclass
class LayerPatches:
    """The patches of one 4-bit layer, applied one after another: W' = diag(rows) W diag(cols) + sum_i scale_i * part_i

    device  where dense weights are computed, when a patch needs them
    """

    key: str
    module: SVDQuantLinear
    store: PartStore
    limits: LoraLimits
    device: torch.device
    notes: list[Note] = field(default_factory=list)
    _parts: list[Columns | Kron] = field(default_factory=list)
    _scales: list[float] = field(default_factory=list)
    _rows: torch.Tensor | None = None
    _cols: torch.Tensor | None = None
    _history: tuple[Any, ...] = ()  # what the weight at this point depends on

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    def branch(self, patches: Sequence[tuple[Any, ...]]) -> Branch | None:
        """All patches as one Branch; None if they change nothing. Raises LoraError naming the kind of patch."""
        for group in grouped([Patch(*patch) for patch in patches]):
            try:
                self._apply(group)
            except LoraError as error:
                raise LoraError(f"the patch of kind {group[0].kind!r}: {error}") from error
        if not self._parts and self._rows is None and self._cols is None:
            return None
        shift = None
        if self._rows is not None and self.module.packed.spec.act_unsigned != (0, 0):
            shift = self._layer().unshifted_bias(torch.zeros(self.shape[0], device=self.device)).cpu()
        return Branch(tuple(self._parts), tuple(self._scales), _on_cpu(self._rows), _on_cpu(self._cols), shift)

    def _apply(self, group: list[Patch]) -> None:
        patch = group[0]
        if isinstance(patch.value, list):
            raise LoraError(MERGE)
        if patch.strength_model != 1:
            self._scale(patch.strength_model, patch.offset)
        if patch.strength != 0 or patch.kind == "set":
            if is_exact(patch):
                self._apply_exact(group)
            elif is_linear(patch):
                made = self._get(patch, None, partial(self._fit_at_strength_1, patch))
                self._add(patch, made.part, patch.strength, made)
            else:
                made = self._get(patch, (self._history, patch.strength), partial(self._fit_in_place, patch))
                self._add(patch, made.part, 1.0, made)
        self._history += tuple((member.identity(), member.strength, member.strength_model) for member in group)

    def _get(self, patch: Patch, context: Any, make: Callable[[], Made], more: Sequence[Patch] = ()) -> Made:
        members = (patch, *more)
        key = (self.key, *(member.identity() for member in members))
        return self.store.get(
            key, (self.limits, context), [tensor for member in members for tensor in member.tensors()], make
        )

    def _add(self, patch: Patch, part: Columns | Kron, scale: float, made: Made) -> None:
        self._parts.append(part)
        self._scales.append(scale)
        self.notes.append(Note(patch.value, patch.kind, part.rank, made.kept, made.milliseconds))

    def _apply_exact(self, group: list[Patch]) -> None:
        patch = group[0]
        made = self._get(patch, None, partial(_timed, partial(_exact, group, self.shape, self.limits)), group[1:])
        magnitude = magnitude_of(patch.value)
        if magnitude is None:
            self._add(patch, made.part, patch.strength * made.factor, made)
            for member in group[1:]:
                self.notes.append(Note(member.value, member.kind, 0, made.kept, 0.0))
            return
        sources = [*patch.tensors()]
        key = (self.key, "DoRA", patch.identity())
        factors, part = self.store.get(key, (self.limits, self._history), sources, partial(self._dora, patch, made))
        # W + s * (diag(m) (W + delta) - W) = diag(1 + s (m - 1)) W + s * diag(m) delta
        self._rescale(*(None if m is None else 1 + patch.strength * (m - 1) for m in (factors.rows, factors.cols)))
        self._add(patch, part, patch.strength * made.factor, made)

    def _dora(self, patch: Patch, made: Made) -> tuple[Dora, Columns | Kron]:
        delta = None
        if magnitude_of(patch.value).shape[0] == 1:
            rows, cols = span(patch.offset, self.shape)
            whole = made.part.dense(*self.shape).to(self.device) * made.factor
            delta = whole[rows[0] : sum(rows), cols[0] : sum(cols)]
        found = dora(magnitude_of(patch.value), self._weight(), delta, patch.offset)
        found = Dora(_on_cpu(found.rows), _on_cpu(found.cols))
        return found, made.part.scaled(found.rows, found.cols)

    def _scale(self, factor: float, offset: Offset | None) -> None:
        """Multiply the weight as it is now by a number, in the rows or columns of `offset`."""
        dim = 1 if offset is not None and offset[0] == 1 else 0
        start, length = span(offset, self.shape)[dim]
        vector = torch.ones(self.shape[dim])
        vector[start : start + length] = factor
        self._rescale(*((vector, None) if dim == 0 else (None, vector)))

    def _rescale(self, rows: torch.Tensor | None, cols: torch.Tensor | None) -> None:
        self._parts = [part.scaled(rows, cols) for part in self._parts]
        if rows is not None:
            self._rows = rows if self._rows is None else self._rows * rows
        if cols is not None:
            self._cols = cols if self._cols is None else self._cols * cols

    def _layer(self) -> Any:
        return self.module.packed.layer(self.module.weight.detach().to(self.device))

    def _weight(self) -> torch.Tensor:
        """The dense weight as it is now, (N, K) float32."""
        branch = Branch(tuple(self._parts), tuple(self._scales), self._rows, self._cols)
        return branch.dense_weight(self._layer().dense_weight())

    def _fit_at_strength_1(self, patch: Patch) -> Made:
        zeros = torch.zeros(self.shape, device=self.device)
        base = self._layer().dense_weight() if patch.kind == "model_as_lora" else None
        alone = Patch(1.0, patch.value, 1.0, patch.offset, patch.function)
        return _timed(lambda: _fitted(host_weight(alone, zeros, self.key, base), self.limits))

    def _fit_in_place(self, patch: Patch) -> Made:
        weight = self._weight()
        alone = Patch(patch.strength, patch.value, 1.0, patch.offset, patch.function)
        return _timed(lambda: _fitted(host_weight(alone, weight.clone(), self.key, None) - weight, self.limits))


def branch_of(
    key: str,
    module: SVDQuantLinear,
    patches: Sequence[tuple[Any, ...]],
    store: PartStore,
    limits: LoraLimits,
    device: torch.device,
    notes: list[Note] | None = None,
) -> Branch | None:
    """All patches of a layer as one Branch; where only strengths are new, the parts are those of the last time.

    raises  LoraError naming the kind of patch that cannot be applied
    """
    plain_loras = _plain_loras(patches)
    known = store.plans.get(key) if notes is None else None
    if known is not None and plain_loras is not None and known.loras == plain_loras:
        return Branch(
            known.parts, tuple(patch[0] * factor for patch, factor in zip(patches, known.factors, strict=True))
        )
    layer = LayerPatches(key, module, store, limits, device)
    branch = layer.branch(patches)
    if notes is not None:
        notes += layer.notes
    if plain_loras is not None and branch is not None:
        factors = tuple(alpha_factor(patch[1]) for patch in patches)
        sources = [tensor for patch in patches for tensor in patch[1].weights[:2]]
        store.remember(key, Plan(plain_loras, branch.parts, factors), sources)
    return branch


def _plain_loras(patches: Sequence[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """What tells plain LoRAs of a whole weight apart beside their strengths; None if one is anything else."""
    found = []
    for strength, value, strength_model, offset, function in patches:
        if type(value) is not LoRAAdapter or offset is not None or function is not None:
            return None
        up, down, alpha, *extras = value.weights
        if strength == 0 or strength_model != 1 or any(extra is not None for extra in extras):
            return None
        found += id(up), id(down), alpha
    return tuple(found)


def _exact(group: list[Patch], shape: tuple[int, int], limits: LoraLimits) -> Made:
    value, offset = group[0].value, group[0].offset
    factor, weights = alpha_factor(value), value.weights
    if isinstance(value, LoHaAdapter):
        found = hadamard((weights[0], weights[1]), (weights[3], weights[4]), offset, shape, limits)
        return Made(found.part, factor, found.kept, 0.0)
    if isinstance(value, LoKrAdapter):
        left, right = (
            (whole,) if whole is not None else (first, second)
            for whole, first, second in ((weights[0], *weights[3:5]), (weights[1], *weights[5:7]))
        )
        if any(factors is None for factors in (*left, *right)):
            raise LoraError("the LoKr file lacks a factor of this layer")
        return Made(kronecker(left, right, offset, shape), factor, 1.0, 0.0)
    return Made(columns_of([_lora_factors(patch, shape) for patch in group], shape), factor, 1.0, 0.0)


def _lora_factors(patch: Patch, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, Offset | None]:
    up, down = patch.value.weights[:2]
    mid, _, reshape = lora_extras(patch.value)
    if reshape is not None and tuple(reshape) != shape:
        raise LoraError(f"the LoRA widens the weight from {shape} to {tuple(reshape)}; a 4-bit weight is fixed")
    if mid is not None:
        down = plain(mid).float() @ plain(down).float()
    if patch.function is not None:
        up = patch.function(plain(up))
    return up, down, patch.offset


def _fitted(delta: torch.Tensor, limits: LoraLimits) -> Made:
    found = fit(delta, limits)
    return Made(found.part, 1.0, found.kept, 0.0)


def _timed(make: Callable[[], Made]) -> Made:
    start = time.perf_counter()
    return make()._replace(milliseconds=1e3 * (time.perf_counter() - start))


def _on_cpu(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.cpu()
