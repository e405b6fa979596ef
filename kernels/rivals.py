"""Backends and modes against each other, by time, on layers of a size: what compute=measured goes by.

Nothing is measured while a model runs. Who calls this sees to it that the device has nothing else to do. A way counts
only after it gave the numbers of the reference in the same mode; where it gains little, what the tables choose stays.
"""

import datetime
from collections.abc import Callable, Iterable

import torch

from .backends import Backend, discover
from .backends.reference import linear as reference
from .dispatch import Choice, arch_of, candidates, choose, fault_of, forget_choices, measured_call
from .formats import FORMATS
from .layer import Layer, LayerSpec
from .measured import ROWS, Kind, Measured, Timed, Write, find, save
from .modes import AUTO, KEPT, USUAL_ROWS
from .self_test import TOLERANCE
from .timing import seconds_of

CHECKED = 64  # rows compared with the reference, spread over all
BETTER = 0.97  # of the time of what the tables choose; less of a gain may be noise
ROOM = 3 << 30  # bytes that measuring the largest layers of today's models takes at most, the clock's included

Say = Callable[[int, int, str], None]  # done, of how many, what
Way = tuple[Backend, str]
"""(backend, mode)"""


def kinds(specs: Iterable[LayerSpec]) -> list[tuple[LayerSpec, int]]:
    """[(a layer, rows)], one for each kind; those with 16-bit activations have no rival, their table decides"""
    found = {(*spec.kind, spec.n, spec.k, rows): (spec, rows) for spec in specs if spec.fmt.low_rank for rows in ROWS}
    return list(found.values())


def missing(specs: Iterable[LayerSpec], device: torch.device, dtype: torch.dtype) -> list[tuple[LayerSpec, int]]:
    """Those of `kinds` that are not measured yet."""
    return [(spec, rows) for spec, rows in kinds(specs) if find(spec, device, dtype, rows) is None]


def dtype_on(device: torch.device) -> torch.dtype:
    """What models usually compute in there"""
    if device.type != "cuda":
        return torch.float32
    return torch.float16 if torch.cuda.get_device_capability(device) < (8, 0) else torch.bfloat16


def measure(
    wanted: Iterable[tuple[LayerSpec, int]],
    device: torch.device,
    dtype: torch.dtype,
    write: Write,
    say: Say | None = None,
) -> list[Measured]:
    """Compare all ways of each layer and keep what is found, one by one, for this process and later ones.

    write   puts bytes into a file, all of them or none
    raises  torch.cuda.OutOfMemoryError, and whatever what the tables choose raises or is wrong by
    """
    found, wanted = [], list(wanted)
    for number, (spec, rows) in enumerate(wanted):
        if say:
            say(number, len(wanted), f"{spec.where}, {rows} rows")
        found.append(compare(spec, device, dtype, rows))
        save(found[-1:], device, write)
        forget_choices()
    if say:
        say(len(wanted), len(wanted), f"{len(found)} kinds of layers measured")
    return found


def compare(
    spec: LayerSpec,
    device: torch.device,
    dtype: torch.dtype,
    rows: int = USUAL_ROWS,
    seconds: Callable[[Callable[[], object], float], float | None] | None = None,
) -> Measured:
    """Every way to compute such a layer: those that are right with their time, and which of them is to run.

    seconds  (a call, a time) -> seconds of the call, or None where it takes much longer than that
    """
    kind, usual = Kind.of(spec, dtype, rows), choose(spec, device, dtype, AUTO, rows)
    clock = seconds or (lambda run, best: seconds_of(run, device, best))
    generator = torch.Generator(device).manual_seed(0)
    layer = random_layer(spec, device, dtype, generator)
    x = torch.randn(rows, spec.k, device=device, generator=generator).to(dtype)
    bias = torch.randn(spec.n, device=device, generator=generator).to(dtype)
    ways = ways_of(kind, device, dtype, usual)
    timed: list[Timed] = []
    left_out: dict[str, str] = {}
    calls: dict[tuple[str, str], Callable[[], torch.Tensor]] = {}
    with torch.inference_mode():
        for backend, mode in ways:
            there = layer.in_order(backend.order(spec, mode))
            run = _call(backend, x, there, bias, mode)
            try:
                error = _error(run(), x, layer, bias, mode)
                if not error <= TOLERANCE:
                    raise ValueError(f"wrong by {error:.3g} of the result, allowed are {TOLERANCE}")
                best = min((each.seconds for each in timed), default=float("inf"))
                time = clock(run, best)
                if time is None:
                    raise ValueError("takes much longer than another way")
            except torch.cuda.OutOfMemoryError:
                raise  # the host makes room
            except Exception as fault:  # a compiler or driver fault has any type
                if (backend, mode) == ways[0]:
                    raise
                left_out[f"{backend.name} {mode}"] = _said(fault)
                continue
            timed.append(Timed(backend.name, mode, time, error))
            calls[backend.name, mode] = run
        winner, table = min(timed, key=lambda each: each.seconds), timed[0]
        # a second time, one after the other: clocks of devices change
        first, second = (clock(calls[each.backend, each.compute], float("inf")) for each in (winner, table))
    surely = first is not None and second is not None and first < BETTER * second
    if winner.seconds >= BETTER * table.seconds or not surely:
        winner = table
    today = datetime.date.today().isoformat()
    return Measured(kind, winner.backend, winner.compute, today, tuple(timed), left_out)


def ways_of(kind: Kind, device: torch.device, dtype: torch.dtype, usual: Choice) -> list[Way]:
    """Every way that a backend claims, and none that failed its self-test; what the tables choose comes first.

    Modes that no table tries there are rivals as well, but not those that take memory beside the layer.
    """
    fmt, (arch, _) = FORMATS[kind.format], arch_of(device)
    tabled = candidates(kind.format, arch, AUTO, kind.rows, kind.act_bits)
    more = [mode for mode in fmt.computes if mode not in (*tabled, *KEPT) and (kind.act_bits == 4 or mode != "w4a4")]
    ways = [(usual.backend, usual.compute)]
    for mode in (*tabled, *more):
        call = measured_call(kind, mode, device, dtype)
        for backend in discover()[0].values():
            able = not isinstance(backend.claims(call), str) and fault_of(backend, call) is None
            if able and (backend, mode) not in ways:
                ways.append((backend, mode))
    return ways


def _call(backend: Backend, x: torch.Tensor, layer: Layer, bias: torch.Tensor, mode: str) -> Callable[[], torch.Tensor]:
    return lambda: backend.linear(x, layer, bias, None, mode)


def _error(y: torch.Tensor, x: torch.Tensor, layer: Layer, bias: torch.Tensor, mode: str) -> float:
    """Relative error of some rows against the reference"""
    rows = torch.linspace(0, len(x) - 1, min(CHECKED, len(x)), device=x.device).long()
    wanted = reference(x[rows], layer, bias, None, mode).float()
    if y.shape != (len(x), layer.spec.n):
        raise ValueError(f"gives {tuple(y.shape)}, needed {(len(x), layer.spec.n)}")
    return ((y[rows].float() - wanted).norm() / wanted.norm()).item()


def _said(fault: Exception) -> str:
    text = (str(fault).strip().splitlines() or [""])[0][:200]
    return text if type(fault) is ValueError else f"{type(fault).__name__}: {text}"


def random_layer(spec: LayerSpec, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Layer:
    """A layer of random bytes, on a device: nothing is quantized for it."""
    tensors = {}
    for name, part in spec.fmt.parts(spec.n, spec.k, spec.rank).items():
        kind = dtype if dtype in part.dtypes else part.dtypes[0]
        if part.optional:
            continue
        if kind == torch.int8:
            tensors[name] = torch.randint(-128, 128, part.shape, device=device, generator=generator, dtype=kind)
            continue
        numbers = torch.rand(part.shape, device=device, generator=generator)
        # scales are positive; the branch has no mean, which would drown the rest
        tensors[name] = (numbers - 0.5 if name.startswith("proj") else numbers + 0.5).to(kind)
    return Layer(spec, tensors)
