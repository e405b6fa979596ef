"""The fastest launch settings of this GPU for the layers of one model, by trying them.

Row limits stay those of tiles.json and one setting replaces one entry, so a tuned model compiles as many variants as
before. Whole layers are timed: what a kernel leaves in the cache for the next one counts.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...dispatch import choose
from ...formats import FORMATS
from ...layer import LayerSpec
from ...rivals import dtype_on, random_layer
from ...self_test import TOLERANCE
from ...timing import gpu_times
from ..reference import linear as reference
from . import tuned
from .tiles import WHERE, Place, Settings, as_shipped, choices, machine, table, trying, tuned_here

ROWS = (16, 256, 4096)  # a row count on each side of the limits in tiles.json
FEW_ROWS = (1,)  # layers with 16-bit activations are modulation layers: one row per image
CHECKED = 64  # rows compared with the reference
REPEATS = 15
BETTER = 0.98  # of the shipped settings' time; less of a gain may be noise

Say = Callable[[int, int, str], None]  # done, of how many, what
Write = Callable[[Path, bytes], object]


@dataclass(frozen=True)
class LayerShape:
    """`count` layers of one size."""

    format: str
    n: int
    k: int
    rank: int
    count: int = 1


@dataclass(frozen=True)
class Job:
    """A call of one layer. `wanted` is what its last rows have to be, nearly"""

    run: Callable[[], torch.Tensor]
    wanted: torch.Tensor
    count: int = 1


@dataclass(frozen=True)
class Found:
    """The best settings of one entry of tiles.json; seconds are of every layer that reaches it, summed up.

    left_out  settings as text -> why they were not timed
    """

    kernel: str
    index: int
    settings: Settings
    seconds: float
    shipped_seconds: float
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int | None:
        """Up to how many rows they are used; None for any number"""
        return table()[self.kernel][self.index]["rows"]


def make_job(shape: LayerShape, rows: int, device: torch.device, dtype: torch.dtype, compute: str = "auto") -> Job:
    """A layer of random bytes with `rows` rows, in the mode that would run it there."""
    generator = torch.Generator(device).manual_seed(0)
    layer = random_layer(LayerSpec(shape.format, shape.n, shape.k, shape.rank), device, dtype, generator)
    x = torch.randn(rows, shape.k, device=device, generator=generator).to(dtype)
    choice = choose(layer.spec, device, dtype, compute, rows)
    run = partial(choice.backend.linear, x, layer, None, None, choice.compute)
    return Job(run, reference(x[-CHECKED:], layer, None, None, choice.compute), shape.count)


def search(jobs: Iterable[Job], time: Callable[[Callable[[], Any]], float], say: Say | None = None) -> list[Found]:
    """Entry by entry: every choice is checked on each job that reaches the entry, then timed; the best one stays.

    time    seconds of a call
    raises  RuntimeError if even the shipped settings do not run, or run wrong
    """
    reached: dict[Place, list[Job]] = {}
    for job in jobs:
        with trying({}) as asked:
            job.run()
        for place in asked:
            reached.setdefault(place, []).append(job)
    total, done = sum(len(choices(kernel)) for kernel, _ in reached), 0
    best: dict[Place, Settings] = {}
    found = []
    for place in sorted(reached):
        kernel, index = place
        shipped = as_shipped(kernel, index)
        seconds, left_out = {}, {}
        others = [each for each in choices(kernel) if each != shipped]
        for number, settings in enumerate((shipped, *others)):
            result = _seconds(reached[place], best | {place: settings}, time)
            if isinstance(result, float):
                seconds[number] = result
            elif number:
                left_out[str(settings)] = result
            else:
                raise RuntimeError(f"{kernel} does not run as shipped on this GPU: {result}")
            done += 1
            if say:
                say(done, total, f"{kernel} {settings}")
        fastest = min(seconds, key=seconds.__getitem__)
        if seconds[fastest] > BETTER * seconds[0]:
            fastest = 0
        best[place] = (shipped, *others)[fastest]
        found.append(Found(kernel, index, best[place], seconds[fastest], seconds[0], left_out))
    return found


def _seconds(jobs: list[Job], chosen: Mapping[Place, Settings], time: Callable[[Any], float]) -> float | str:
    """Of all jobs together, or why there is no time"""
    total = 0.0
    with trying(chosen):
        for job in jobs:
            try:
                y = job.run()[-CHECKED:].float()
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler or driver fault has any type
                return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            wrong = ((y - job.wanted.float()).norm() / job.wanted.float().norm()).item()
            if not wrong <= TOLERANCE:
                return f"wrong by {wrong:.3g} of the result, allowed are {TOLERANCE}"
            total += job.count * time(job.run)
    return total


def tune(
    shapes: Iterable[LayerShape],
    device: torch.device,
    write: Write,
    compute: str = "auto",
    say: Say | None = None,
    seconds: Callable[[Callable[[], Any]], float] | None = None,
) -> tuple[list[Found], Path]:
    """(what `search` finds for these layers on this GPU, the file it was written to)

    write    puts bytes into a file, all of them or none
    seconds  of a call; by default the median of some runs on the GPU
    """
    dtype = dtype_on(device) if device.type == "cuda" else torch.bfloat16
    if seconds is None:

        def seconds(run: Callable[[], Any]) -> float:
            return statistics.median(gpu_times(run, device, REPEATS))

    with torch.inference_mode():
        jobs = [
            make_job(shape, rows, device, dtype, compute)
            for shape in shapes
            for rows in (ROWS if FORMATS[shape.format].low_rank else FEW_ROWS)
        ]
        found = search(jobs, seconds, say)
    return found, save(found, device, write)


def save(found: Iterable[Found], device: torch.device, write: Write) -> Path:
    """Write what is not as shipped, beside what earlier runs found of other entries; new processes launch with it."""
    here = machine(device)
    best = tuned_here(here) | {(each.kernel, each.index): dict(each.settings) for each in found}
    tables: tuned.Tables = {}
    for (kernel, index), settings in best.items():
        if settings != as_shipped(kernel, index):
            where = {key: table()[kernel][index][key] for key in WHERE}
            tables.setdefault(kernel, []).append(where | settings)
    path = tuned.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, tuned.with_tables(here, tables))
    tuned_here.cache_clear()
    return path
