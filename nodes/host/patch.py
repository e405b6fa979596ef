"""Bridge: what the host's patches are, and what the host itself makes of one on a dense weight."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import comfy.lora
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase

from ...quantize.lora.terms import WIDTH, LoraError, Offset

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


def grouped(patches: Sequence[Patch]) -> list[list[Patch]]:
    """Patches that change something, in order; LoRAs of a few columns for neighbouring slices share one block of them.

    A block is a multiple of 16 columns wide and has one strength: q, k and v at rank 4 take 16 columns, not 48.
    """
    groups: list[list[Patch]] = []
    for patch in patches:
        if patch.idle:
            continue
        last = groups[-1] if groups else None
        if last is not None and _may_join(last, patch):
            last.append(patch)
        else:
            groups.append([patch])
    return groups


def _may_join(group: list[Patch], patch: Patch) -> bool:
    first = group[0]
    if not all(_is_narrow_slice(member) for member in (first, patch)):
        return False
    same = (first.strength, alpha_factor(first.value)) == (patch.strength, alpha_factor(patch.value))
    overlap = any(
        member.offset[0] != patch.offset[0]
        or max(member.offset[1], patch.offset[1]) < min(sum(member.offset[1:]), sum(patch.offset[1:]))
        for member in group
    )
    return same and not overlap


def _is_narrow_slice(patch: Patch) -> bool:
    if type(patch.value) is not LoRAAdapter or patch.offset is None or patch.function is not None:
        return False
    mid, magnitude, reshape = lora_extras(patch.value)
    rank = patch.value.weights[1].shape[0]
    return patch.strength_model == 1 and rank % WIDTH != 0 and mid is None and magnitude is None and reshape is None


def lora_extras(value: LoRAAdapter) -> tuple[Any, Any, Any]:
    """(mid, DoRA magnitude, new shape)"""
    return (*value.weights[3:], None, None, None)[:3]


def magnitude_of(value: Any) -> torch.Tensor | None:
    place = {LoRAAdapter: 4, LoHaAdapter: 7, LoKrAdapter: 8}.get(type(value))
    return value.weights[place] if place is not None and len(value.weights) > place else None


def alpha_factor(value: WeightAdapterBase) -> float:
    """alpha / rank, as the host has it"""
    weights = value.weights
    rank = None
    if isinstance(value, LoRAAdapter | LoHaAdapter):
        rank = weights[1].shape[0]
    elif isinstance(value, LoKrAdapter):
        decomposed = weights[6] if weights[1] is None else weights[4] if weights[0] is None else None
        rank = None if decomposed is None else decomposed.shape[0]
    return 1.0 if weights[2] is None or rank is None else float(weights[2]) / rank


def is_exact(patch: Patch) -> bool:
    value = patch.value
    if type(value) is LoRAAdapter:
        return patch.function is None or (magnitude_of(value) is None and _moves_rows(patch))
    if type(value) is LoHaAdapter:
        return patch.function is None and value.weights[5] is None
    return type(value) is LoKrAdapter and patch.function is None and value.weights[7] is None


def _moves_rows(patch: Patch) -> bool:
    """Whether function(up @ down) = function(up) @ down, tried on random factors of the patch's height."""
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(patch.value.weights[0].shape[0], 2, generator=generator)
    down = torch.randn(2, 5, generator=generator)
    return torch.allclose(patch.function(up @ down), patch.function(up.clone()) @ down, rtol=1e-4, atol=1e-5)


def is_linear(patch: Patch) -> bool:
    """Whether its delta is strength times a matrix that does not depend on the other patches."""
    if patch.function is not None and type(patch.value) in (LoHaAdapter, LoKrAdapter):
        return False
    return patch.kind in ("diff", "model_as_lora") or (
        type(patch.value) in (LoHaAdapter, LoKrAdapter) and magnitude_of(patch.value) is None
    )


def host_weight(patch: Patch, weight: torch.Tensor, key: str, original: torch.Tensor | None) -> torch.Tensor:
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
