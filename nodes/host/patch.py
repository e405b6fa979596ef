"""Bridge: the host's patches of a weight -> terms of quantize.lora, and from them the LoRAs of a 4-bit layer."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import comfy.lora
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase

from ...quantize.lora.deltas import LoraError, Offset
from ...quantize.lora.loras import LayerLoras
from ...quantize.lora.patched_weight import PatchedWeight
from ...quantize.lora.store import FactorStore, PlainLoras
from ...quantize.lora.terms import DenseDelta, Factors, LohaFactors, LokrFactors, LoraFactors, Term, WeightFunction

MERGE = "a 4-bit model cannot be merged; merge the 16-bit models and quantize the result"


class Patch(NamedTuple):
    """One entry of ModelPatcher.patches, in the host's order."""

    strength: float
    value: Any
    strength_model: float
    offset: Offset | None
    function: Callable[[torch.Tensor], torch.Tensor] | None

    @property
    def kind(self) -> str:
        if isinstance(self.value, WeightAdapterBase):
            return f"{self.value.name} with DoRA" if magnitude_of(self.value) is not None else self.value.name
        if isinstance(self.value, list):
            return "model merge"
        return self.value[0] if len(self.value) == 2 else "diff"

    @property
    def idle(self) -> bool:
        """Whether it changes nothing."""
        return self.strength == 0 and self.strength_model == 1 and self.kind != "set"

    def tensors(self) -> list[torch.Tensor]:
        return [item for item in self._items() if isinstance(item, torch.Tensor)]

    def identity(self) -> tuple[Any, ...]:
        """Equal for two patches that differ in strength alone: the tensors are told apart by object."""
        items = (id(item) if isinstance(item, torch.Tensor) else repr(item) for item in self._items())
        return (type(self.value).__name__, *items, self.offset, self.function)

    def _items(self) -> Sequence[Any]:
        if isinstance(self.value, WeightAdapterBase):
            return self.value.weights
        return (self.kind, *self.value[-1]) if isinstance(self.value[-1], tuple) else self.value


def known_loras(store: FactorStore, key: str, patches: Sequence[tuple[Any, ...]]) -> LayerLoras | None:
    """What `loras_of` gave for this layer, at the strengths of now; None where more than strengths is new."""
    identity = _plain_identity(patches)
    return None if identity is None else store.at_strengths(key, identity, [patch[0] for patch in patches])


def loras_of(weight: PatchedWeight, patches: Sequence[tuple[Any, ...]]) -> LayerLoras | None:
    """All patches of a layer together. Raises LoraError naming the kind of patch that cannot be applied.

    Strength 0 changes nothing, and a patch that starts with it is left out. One that has run already stays, so that
    what torch.compile made of the layer serves on.
    """
    named, identity = [Patch(*patch) for patch in patches], _plain_identity(patches)
    kept = [patch for patch in named if not patch.idle or _has_run(patch, weight)]
    loras = weight.loras([_term(patch, weight.key) for patch in kept])
    if identity is not None and loras is not None and len(kept) == len(named):
        alphas = tuple(alpha_factor(patch[1]) for patch in patches)
        sources = [tensor for patch in patches for tensor in patch[1].weights[:2]]
        weight.store.remember(weight.key, PlainLoras(identity, loras.deltas, alphas), sources)
    return loras


def _has_run(patch: Patch, weight: PatchedWeight) -> bool:
    return (is_exact(patch) or is_linear(patch)) and weight.store.holds(weight.key, patch.identity())


def _plain_identity(patches: Sequence[tuple[Any, ...]]) -> tuple[object, ...] | None:
    """What tells plain LoRAs of a whole weight apart beside their strengths; None if one is anything else."""
    identity: list[object] = []
    for _, value, strength_model, offset, function in patches:
        if type(value) is not LoRAAdapter or offset is not None or function is not None:
            return None
        up, down, alpha, *extras = value.weights
        if strength_model != 1 or any(extra is not None for extra in extras):
            return None
        identity += id(up), id(down), alpha
    return tuple(identity)


def _term(patch: Patch, key: str) -> Term:
    if isinstance(patch.value, list):
        raise LoraError(f"the patch of kind {patch.kind!r}: {MERGE}")
    form = _form(patch, key) if patch.strength != 0 or patch.idle or patch.kind == "set" else None
    identity, tensors = patch.identity(), patch.tensors()
    return Term(patch.value, patch.kind, identity, tensors, patch.strength, patch.strength_model, patch.offset, form)


def _form(patch: Patch, key: str) -> Factors | DenseDelta | WeightFunction:
    """What quantize.lora can make factors of; what has none of its own forms goes through the host's arithmetic."""
    if is_exact(patch):
        return _factors(patch)
    if is_linear(patch):
        whole = patch._replace(strength=1.0, strength_model=1.0)
        return DenseDelta(partial(host_weight, whole, key), patch.kind == "model_as_lora")
    return WeightFunction(partial(host_weight, patch._replace(strength_model=1.0), key))


def _factors(patch: Patch) -> Factors:
    value, weights = patch.value, patch.value.weights
    alpha, magnitude = alpha_factor(value), magnitude_of(value)
    if isinstance(value, LoHaAdapter):
        return LohaFactors((weights[0], weights[1]), (weights[3], weights[4]), alpha, magnitude)
    if isinstance(value, LoKrAdapter):
        left = (weights[3], weights[4]) if weights[0] is None else (weights[0],)
        right = (weights[5], weights[6]) if weights[1] is None else (weights[1],)
        return LokrFactors(left, right, alpha, magnitude)
    up, down = weights[:2]
    mid, _, new_shape = (*weights[3:], None, None, None)[:3]
    return LoraFactors(up, down, mid, alpha, magnitude, new_shape, patch.function)


def magnitude_of(value: Any) -> torch.Tensor | None:
    place = {LoRAAdapter: 4, LoHaAdapter: 7, LoKrAdapter: 8}.get(type(value))
    return value.weights[place] if place is not None and len(value.weights) > place else None


def alpha_factor(value: WeightAdapterBase) -> float:
    """alpha / rank, as the host has it. Raises LoraError for factors without a rank."""
    weights = value.weights
    rank = None
    if isinstance(value, LoRAAdapter | LoHaAdapter):
        rank = weights[1].shape[0]
    elif isinstance(value, LoKrAdapter):
        decomposed = weights[6] if weights[1] is None else weights[4] if weights[0] is None else None
        rank = None if decomposed is None else decomposed.shape[0]
    if rank == 0:
        raise LoraError("its factors have rank 0: the file is damaged")
    return 1.0 if weights[2] is None or rank is None else float(weights[2]) / rank


def is_exact(patch: Patch) -> bool:
    value = patch.value
    if type(value) is LoRAAdapter:
        if patch.function is None:
            return True
        return magnitude_of(value) is None and _moves_rows(patch.function, value.weights[0].shape[0])
    if type(value) is LoHaAdapter:
        return patch.function is None and value.weights[5] is None
    return type(value) is LoKrAdapter and patch.function is None and value.weights[7] is None


def _moves_rows(function: Callable[[torch.Tensor], torch.Tensor], height: int) -> bool:
    """Whether function(up @ down) = function(up) @ down, tried on random factors of this height.

    The host hands over a bare function, in practice one that swaps halves of the rows; nothing says what it does. If
    the equation holds for random factors it holds for all, but for a set of functions of measure zero: any mixing of
    columns or any nonlinear step shows on them. Where it does not hold, the host's own arithmetic is used instead.
    """
    generator = torch.Generator()  # its numbers are the same ones each time
    up = torch.randn(height, 2, generator=generator)
    down = torch.randn(2, 5, generator=generator)
    return torch.allclose(function(up @ down), function(up.clone()) @ down, rtol=1e-4, atol=1e-5)


def is_linear(patch: Patch) -> bool:
    """Whether its delta is strength times a matrix that does not depend on the other patches."""
    if patch.function is not None and type(patch.value) in (LoHaAdapter, LoKrAdapter):
        return False
    return patch.kind in ("diff", "model_as_lora") or (
        type(patch.value) in (LoHaAdapter, LoKrAdapter) and magnitude_of(patch.value) is None
    )


def host_weight(patch: Patch, key: str, weight: torch.Tensor, original: torch.Tensor | None = None) -> torch.Tensor:
    """The host's own arithmetic on a dense weight. Raises LoraError with the host's words where it only logs them."""
    with _complaints() as said:
        try:
            new = comfy.lora.calculate_weight([patch], weight, key, original_weights={key: [(original, None)]})
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise LoraError(f"ComfyUI cannot apply it ({error})") from error
    if said:
        raise LoraError(f"ComfyUI cannot apply it ({said[0]})")
    if new.shape != weight.shape:
        raise LoraError(f"it changes the weight's shape to {tuple(new.shape)}; a 4-bit weight is fixed")
    return new


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """What the host logs as a warning or worse meanwhile: its adapters log an error and leave the weight as it was."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener, root = Listener(logging.WARNING), logging.getLogger()
    root.addHandler(listener)
    try:
        yield said
    finally:
        root.removeHandler(listener)
