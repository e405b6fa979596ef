"""Weights computed from a layer's bytes, kept as long as those bytes live.

A host owns the bytes: it may free, move or overwrite them at any time. An entry holds none of them. It is found by the
storage they lie in and dies with it, and it is used only while the version counter and a sample of the bytes are those
it was made from.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, TypeVar

import torch

from .layer import version_of

SAMPLES = 256  # bytes compared before an entry is used, evenly spread
IDLE_SECONDS = 60.0  # an entry unused for so long makes room for others
BUDGET = 0.25  # of the machine's memory, for the weights that are kept on a CPU for all models together


Value = TypeVar("Value")


@dataclass
class CachedWeight(Generic[Value]):
    """A value and what it was made from: `storage` held weakly, its version counter, and a sample of its bytes."""

    storage: weakref.ref[torch.UntypedStorage]
    version: int
    sample: bytes
    value: Value
    nbytes: int
    used: float = field(default_factory=time.monotonic)


class WeightCache(Generic[Value]):
    """A bounded cache. What does not fit is not kept.

    Evicting in turn would keep nothing at all, as a model's layers come round in the same order each step.

    budget  () -> bytes that all entries together may take
    """

    def __init__(self, budget: Callable[[], int]) -> None:
        self._budget = budget
        self._entries: dict[tuple[Any, ...], CachedWeight[Value]] = {}
        self._lock = threading.Lock()
        self.nbytes = 0

    def get(self, source: torch.Tensor, variant: tuple[Any, ...], compute: Callable[[], Value], nbytes: int) -> Value:
        """compute(), or what it gave for the same bytes. `source` is the tensor they are sampled from

        variant  tells apart the values made from one source
        nbytes   size of the value
        """
        storage = source.untyped_storage()
        key = (storage.data_ptr(), source.storage_offset(), tuple(source.shape), *variant)
        version, sample = version_of(source), _sample(source)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                if entry.storage() is storage and (entry.version, entry.sample) == (version, sample):
                    entry.used = time.monotonic()
                    return entry.value
                self._remove(key, entry)
        value = compute()
        with self._lock:
            if self._make_room(nbytes):
                ref = weakref.ref(storage, lambda ref: self._forget(key, ref))
                self._entries[key] = CachedWeight(ref, version, sample, value, nbytes)
                self.nbytes += nbytes
        return value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def _make_room(self, nbytes: int) -> bool:
        budget = self._budget()
        if nbytes > budget:
            return False
        if self.nbytes + nbytes > budget:
            oldest = time.monotonic() - IDLE_SECONDS
            for key, entry in list(self._entries.items()):
                if entry.used < oldest:
                    self._remove(key, entry)
        return self.nbytes + nbytes <= budget

    def _forget(self, key: tuple[Any, ...], ref: weakref.ref[torch.UntypedStorage]) -> None:
        # called when a storage dies, possibly while this thread holds the lock: dict operations are atomic
        entry = self._entries.get(key)
        if entry is not None and entry.storage is ref:
            self._remove(key, entry)

    def _remove(self, key: tuple[Any, ...], entry: CachedWeight[Value]) -> None:
        if self._entries.pop(key, None) is entry:
            self.nbytes -= entry.nbytes


def _sample(tensor: torch.Tensor) -> bytes:
    """A few bytes of the tensor; none on a GPU, where looking would wait for it"""
    if tensor.device.type != "cpu":
        return b""
    as_bytes = tensor.dtype in (torch.int8, torch.uint8) and tensor.is_contiguous()
    flat = tensor if as_bytes else tensor.reshape(-1).view(torch.uint8)
    step = max(1, flat.numel() // SAMPLES)
    return flat.as_strided((-(-flat.numel() // step),), (step,)).numpy().tobytes()


@cache
def cpu_budget() -> int:
    """Bytes that may be kept on a CPU; none where the machine does not say how much memory it has."""
    try:
        return int(BUDGET * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # Windows
        return _budget_from_psutil()


def _budget_from_psutil() -> int:
    try:
        import psutil  # ComfyUI brings it
    except ImportError:
        return 0
    return int(BUDGET * psutil.virtual_memory().total)


ON_CPU: WeightCache[Any] = WeightCache(cpu_budget)
