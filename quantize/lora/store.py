"""What was made of LoRA files, kept for as long as the files are in memory."""

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from .deltas import Delta
from .loras import LayerLoras

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PlainLoras:
    """The LoRAs of a layer, all plain: what they are, their deltas, and the alpha of each."""

    identity: tuple[object, ...]
    deltas: tuple[Delta, ...]
    alphas: tuple[float, ...]


class FactorStore:
    """Factored terms of one model, shared by all its clones; an entry dies with the LoRA file's tensors.

    Strength is no part of an entry, so that a change of strength makes nothing anew.

    Keys hold the `id` of tensors: to compare their values would cost more than to factor them anew. An id may be given
    to another object once its own is gone, and is safe here because an entry watches those very tensors by weak
    reference: the first of them to go takes the entry along, before anything else can have its id.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[object, Any, list[weakref.ref[torch.Tensor]]]] = {}
        self._plain: dict[str, PlainLoras] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, context: object, sources: Sequence[torch.Tensor], make: Callable[[], T]) -> T:
        """What `make` gave for this key and context; of several contexts only the last is kept."""
        entry = self._entries.get(key)
        if entry is not None and entry[0] == context:
            return entry[1]
        value = make()
        forget = partial(_forget, weakref.ref(self), key)
        self._entries[key] = context, value, [weakref.ref(tensor, forget) for tensor in sources]
        return value

    def holds(self, layer: str, identity: object) -> bool:
        """Whether anything was made of the patch of a layer that is told apart by `identity`."""
        return any(key[0] == layer and identity in key for key in self._entries if isinstance(key, tuple))

    def remember(self, layer: str, plain: PlainLoras, sources: Sequence[torch.Tensor]) -> None:
        """Keep the plain LoRAs of a layer, for `at_strengths`."""
        self._plain[layer] = plain
        self.get((layer, "plain"), plain.identity, sources, lambda: None)

    def at_strengths(self, layer: str, identity: tuple[object, ...], strengths: Sequence[float]) -> LayerLoras | None:
        """The LoRAs that a layer was last given, with other strengths; None if it was given others, or they
        are not finite, which `PatchedWeight.loras` refuses by name."""
        plain = self._plain.get(layer)
        if plain is None or plain.identity != identity or not all(map(math.isfinite, strengths)):
            return None
        scales = tuple(strength * alpha for strength, alpha in zip(strengths, plain.alphas, strict=True))
        return LayerLoras(plain.deltas, scales)

    def drop(self, key: Hashable) -> None:
        self._entries.pop(key, None)
        if isinstance(key, tuple) and key[1:] == ("plain",):
            self._plain.pop(key[0], None)


def _forget(store: "weakref.ref[FactorStore]", key: Hashable, _: "weakref.ref[torch.Tensor]") -> None:
    alive = store()
    if alive is not None:
        alive.drop(key)
