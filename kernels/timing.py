"""How long a GPU takes for a call."""

from collections.abc import Callable
from typing import Any

import torch

FLUSH = 256 << 20  # bytes written between two runs, more than any GPU's cache
SLEEP = 1_000_000  # GPU cycles, about 0.6 ms: more than it takes to queue the launches of a layer


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
