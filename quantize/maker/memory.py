"""How much memory a piece of work took."""

import contextlib
import ctypes
import threading
from pathlib import Path
from types import TracebackType

import torch

STATUS = Path("/proc/self/status")
INTERVAL = 0.05  # seconds between two looks


def own_bytes() -> int:
    """Memory of this process that is no mapped file; 0 where the system does not say."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def give_back() -> None:
    """Hand freed memory back to the system, or work that reuses it would seem to take none. glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """with PeakMemory() as peak: ...; then `peak.bytes` is the most that was taken above the start, GPU apart."""

    def __init__(self) -> None:
        self.bytes, self.gpu_bytes = 0, 0
        self._stop = threading.Event()

    def __enter__(self) -> "PeakMemory":
        give_back()
        self._start = own_bytes()
        self._gpu = torch.cuda.is_initialized()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, own_bytes() - self._start)
            if self._stop.wait(INTERVAL):
                return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, own_bytes() - self._start)
        if self._gpu:
            self.gpu_bytes = torch.cuda.max_memory_allocated()
