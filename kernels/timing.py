"""How long a device takes for a call."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH = 256 << 20  # bytes written between two runs, more than any GPU's cache
SLEEP = 1_000_000  # GPU cycles, about 0.6 ms: more than it takes to queue the launches of a layer


REPEATS = 15
FEW_REPEATS = 5  # on a CPU, where a call of a large layer takes seconds
MUCH = 2.0  # times as long: not worth a second look


def seconds_of(run: Callable[[], Any], device: torch.device, best: float) -> float | None:
    """The median of some calls; None where the first takes much longer than `best`, and on a GPU never

    On a CPU it has run once before.
    """
    if device.type == "cuda":
        return statistics.median(gpu_times(run, device, REPEATS))
    found: list[float] = []
    while len(found) < FEW_REPEATS:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
        if found[0] > MUCH * best:
            return None
    return statistics.median(found)


def gpu_times(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs after two that are not counted; each finds the caches cold.

    The GPU sleeps until a whole run is queued: what is measured is its own time, not that of the launches.
    """
    for _ in range(2):
        run()
    with torch.cuda.device(device):
        flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
        events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(repeats)]
        for start, stop in events:
            flush.zero_()
            torch.cuda._sleep(SLEEP)
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize(device)
    return [start.elapsed_time(stop) * 1e-3 for start, stop in events]
