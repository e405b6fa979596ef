"""What the first call of a model would wait for, done while its weights load.

Every kernel that its layers need, for every number of rows, is compiled, runs on a small layer like them, and is
compared with the reference. Whoever calls a layer meanwhile waits for the one kernel that is being compiled and for
those of that call; what is wrong with one is said by the first call that would have used it. On a CPU there is nothing
to compile, and nothing happens.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping

import torch

from . import dispatch
from .backends import discover
from .layer import LayerSpec
from .self_test import Sample, sample_of

log = logging.getLogger("svdquant")
# one for each side of every limit at which a kernel, its settings or the mode change; an image's come first
ROWS = (1000, 600, 200, 100, 40, 5)
FEW_ROWS = (5,)  # layers with 16-bit activations are modulation layers: one row per image
Key = tuple[torch.device, str, Sample, torch.dtype]
_begun: set[Key] = set()


class FirstUse:
    """Compiles and compares in a thread of its own: `add` each layer, then `close`.

    device   of the calls
    compute  as asked for; `kernels` and `seconds` say what was compiled so far

        >>> first_use = FirstUse(torch.device("cpu"), "auto")
        >>> first_use.add(LayerSpec("int4", n=96, k=128), {"qweight": torch.int8}, True, torch.float32)
        >>> first_use.close()
        >>> first_use.kernels, first_use.running
        (0, False)
    """

    def __init__(self, device: torch.device, compute: str) -> None:
        self.device, self.compute = device, compute
        self.kernels, self.seconds = 0, 0.0
        self._waiting: deque[Key] = deque()
        self._lock, self.running = threading.Lock(), False
        self._closed = self._stopped = False
        self._before, self._start = compiled(), 0.0

    def __reduce__(self) -> tuple[type["FirstUse"], tuple[torch.device, str]]:
        return FirstUse, (self.device, self.compute)  # threads and locks stay where they are

    def add(self, spec: LayerSpec, kinds: Mapping[str, torch.dtype], biased: bool, dtype: torch.dtype) -> None:
        """A layer with tensors of these types is going to be called on activations of this one.

        What was begun for another layer, or model, is not done again.
        """
        if self.device.type == "cpu":
            return
        sample = sample_of(spec, kinds, biased)
        key = self.device, self.compute, sample, dtype
        with self._lock:
            if key in _begun or self._stopped:
                return
            _begun.add(key)
            self._start = self._start or time.monotonic()
            self._waiting.append(key)
            if not self.running:
                self.running = True
                threading.Thread(target=self._work, name="svdquant first use").start()

    def close(self) -> None:
        """There is no other layer: when the last one is done, a line in the log says so."""
        with self._lock:
            self._closed = True
            done = not self.running and self._start > 0
        if done:
            self._say()

    def stop(self) -> None:
        """Nothing more is begun: the model is gone. A next one begins where this one stopped."""
        with self._lock:
            self._stopped = True
            _begun.difference_update(self._waiting)
            self._waiting.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._stopped:
                    self.running = False
                    last = self._closed and not self._stopped
                    break
                key = self._waiting.popleft()
            try:
                self._try(*key)
            except Exception:  # no fault of the load: the first call meets it as well, and says it
                log.debug("first use of %s", key, exc_info=True)
                _begun.discard(key)
            self.kernels, self.seconds = compiled() - self._before, time.monotonic() - self._start
        if last:
            self._say()

    def _try(self, device: torch.device, compute: str, sample: Sample, dtype: torch.dtype) -> None:
        for rows in rows_of(sample):
            if self._stopped or not threading.main_thread().is_alive():  # the process is ending
                _begun.discard((device, compute, sample, dtype))
                return
            dispatch.try_out(sample, device, dtype, compute, rows)

    def _say(self) -> None:
        log.info(
            "%d kernels were compiled for %s in %.1f s while weights loaded", self.kernels, self.device, self.seconds
        )


def rows_of(sample: Sample) -> tuple[int, ...]:
    """How many rows its calls are tried with"""
    return ROWS if sample.spec.fmt.low_rank else FEW_ROWS


def compiled() -> int:
    """Kernels that were compiled in this process, or found where an earlier one kept them"""
    return sum(backend.compiled() for backend in discover()[0].values())
