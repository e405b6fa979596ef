"""Which backend runs a call in which mode, and why the others do not."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from .backends import Backend, KernelCall, Run, discover
from .formats import FORMATS, format_named
from .layer import Layer, LayerSpec, Lora
from .measured import Kind, Measured, find
from .modes import AUTO, COMPUTES, FEW, MEASURED, SOME, USUAL_ROWS
from .order import ORDERS
from .self_test import Sample, self_test

log = logging.getLogger("svdquant")
Tested = tuple[str, KernelCall]
Fault = Callable[[Backend, KernelCall], str | None]
_tested: dict[Tested, str | None] = {}
_testing: dict[Tested, threading.RLock] = {}  # who wants a backend that another thread tests waits for the result
_chosen: dict[tuple[Any, ...], "Choice"] = {}
_turned_off = 0  # how often: a choice from before is none any more
_by_reference: ContextVar[bool] = ContextVar("svdquant_by_reference", default=False)


@dataclass(frozen=True)
class Choice:
    """The backend that runs a layer, the compute mode, and one reason per backend that does not.

    measured  what decided it; None for the tables
    """

    backend: Backend
    compute: str
    passed_over: dict[str, str]
    measured: Measured | None = None


@cache
def arch_of(device: torch.device) -> tuple[str, tuple[int, int] | None]:
    """("sm_90", (9, 0)), ("gfx942", None) or ("cpu", None)"""
    if device.type != "cuda":
        return device.type, None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], None
    return f"sm_{properties.major}{properties.minor}", (properties.major, properties.minor)


def bucket(rows: int) -> int:
    """Rows rounded up to 128, 768 or the rest: the choice is made once for each, whatever the resolution"""
    return FEW if rows <= FEW else SOME if rows <= SOME else USUAL_ROWS


def candidates(format: str, arch: str, compute: str, rows: int, act_bits: int = 4) -> tuple[str, ...]:
    """The modes to try, best first; `arch` is "cpu" on a CPU.

    Layers that keep 16-bit activations have no other mode than their own, whatever is asked for.
    """
    fmt = FORMATS[format]
    if compute not in (AUTO, MEASURED) and fmt.low_rank:
        return (compute,)
    tried = [mode for mode in fmt.modes if arch.startswith(mode.arch) and (mode.rows is None or rows <= mode.rows)]
    return tuple(mode.compute for mode in tried if act_bits == 4 or mode.compute != "w4a4")


def faster_format(format: str, arch: str) -> str | None:
    """The format whose files such a GPU computes in w4a4, where it has only another mode for those of `format`

    None where `format` is as good as it gets there, and for layers that have no w4a4.
    """
    four_bit = [name for name in FORMATS if candidates(name, arch, "auto", SOME + 1)[0] == "w4a4"]
    has_w4a4 = any(mode.compute == "w4a4" for mode in FORMATS[format].modes)
    return next(iter(four_bit), None) if has_w4a4 and format not in four_bit else None


def choose(
    spec: LayerSpec, device: torch.device, dtype: torch.dtype, compute: str = "auto", rows: int = USUAL_ROWS
) -> Choice:
    """(backend, mode) = the first mode to try there that a backend claims, and the backend that claims it most

    compute  a mode that is asked for, auto, or measured: what was the fastest for layers of this size, if that is known
    rows     M of the activation
    raises   ValueError with every reason if there is none

        >>> choice = choose(LayerSpec("int4", n=96, k=128), torch.device("cpu"), torch.float32, compute="w16")
        >>> choice.backend.name, choice.compute
        ('reference', 'w16')
        >>> choice.passed_over["gluon"]
        'computes w4a4 and w4a8-jit, not w16'
    """
    size = (spec.n, spec.k) if compute == MEASURED else ()
    key = spec.kind, device, dtype, compute, bucket(rows), size
    choice = _chosen.get(key)
    if choice is None:
        choice = _chosen[key] = _choose(spec, device, dtype, compute, bucket(rows))
    return choice


def order_of(spec: LayerSpec, device: torch.device, dtype: torch.dtype, compute: str = "auto") -> str:
    """The order of bytes that is read as it is there, however many rows a call has; "", natural, where there is none

    >>> order_of(LayerSpec("int4", n=64, k=128), torch.device("cpu"), torch.float32)
    ''
    """
    try:
        choices = [_choose(spec, device, dtype, compute, rows, known_fault) for rows in (FEW, SOME, USUAL_ROWS)]
    except ValueError:  # nothing runs it: the first call will say so
        return ""
    orders = {choice.backend.order(spec, choice.compute) for choice in choices}
    order = orders.pop() if len(orders) == 1 else ""
    return "" if order and spec.n % ORDERS[order].rows else order


def _choose(
    spec: LayerSpec, device: torch.device, dtype: torch.dtype, compute: str, rows: int, fault_in: Fault | None = None
) -> Choice:
    if compute not in COMPUTES:
        raise ValueError(f"compute is {compute!r}, known are {', '.join(COMPUTES)}")
    backends, absent = discover()
    reasons, asked = dict(absent), compute not in (AUTO, MEASURED)
    found, faults = find(spec, device, dtype, rows) if compute == MEASURED else None, {}
    if found is not None:
        choice = _as_measured(found, device, dtype)
        if not isinstance(choice, str):
            return choice
        faults = {found.backend: f"{found.compute} was the fastest when measured, but: {choice}"}
    arch, capability = arch_of(device)
    for mode in candidates(spec.format, arch, compute, rows, spec.act_bits):
        call = KernelCall(spec.format, device, dtype, mode, capability, arch, rows, spec.partly_unsigned, asked)
        claims = {backend.name: backend.claims(call) for backend in backends.values()}
        reasons |= {name: claim for name, claim in claims.items() if isinstance(claim, str)}
        able = {name: claim for name, claim in claims.items() if not isinstance(claim, str)}
        for name in sorted(able, key=able.__getitem__, reverse=True):
            fault = (fault_in or fault_of)(backends[name], call)
            if fault is None:
                reasons = {other: why for other, why in (reasons | faults).items() if other != name}
                return Choice(backends[name], mode, reasons)
            reasons[name] = fault
    lines = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"no kernel backend runs {spec.format} on {device} in {dtype} with compute={compute}: {lines}")


def _as_measured(found: Measured, device: torch.device, dtype: torch.dtype) -> Choice | str:
    """What was the fastest, or why it does not run such layers now"""
    backends, absent = discover()
    call = measured_call(found.kind, found.compute, device, dtype)
    claims = {backend.name: backend.claims(call) for backend in backends.values()}
    claim = claims.get(found.backend, "it is not there")
    fault = claim if isinstance(claim, str) else fault_of(backends[found.backend], call)
    if fault is not None:
        return fault
    reasons = absent | {name: claim for name, claim in claims.items() if isinstance(claim, str)}
    reasons |= {name.split()[0]: f"{name.split()[1]} {why}" for name, why in reversed(found.left_out.items())}
    for way in sorted(found.timed, key=lambda way: -way.seconds):  # the fastest of a backend's ways is said last
        share = way.seconds / found.chosen.seconds
        reasons[way.backend] = f"{way.compute} took {share:.2f} of the time of {found.chosen.name}"
    reasons.pop(found.backend, None)
    return Choice(backends[found.backend], found.compute, reasons, found)


def measured_call(kind: Kind, compute: str, device: torch.device, dtype: torch.dtype) -> KernelCall:
    """A call for which backends are compared by their times"""
    arch, capability = arch_of(device)
    call = KernelCall(kind.format, device, dtype, compute, capability, arch, kind.rows, kind.partly_unsigned)
    return replace(call, asked=False, measured=True)


def forget_choices() -> None:
    """Choose anew: what was measured is other than it was."""
    global _turned_off
    _turned_off += 1
    _chosen.clear()


def computes_of(format: str) -> tuple[str, ...]:
    """What may be asked of layers of this format on any device: what the format defines

    Layers with 16-bit activations have one way to compute, whatever is asked for.
    """
    fmt = format_named(format)
    return tuple(each for each in COMPUTES if each in (AUTO, MEASURED) or each in fmt.computes or not fmt.low_rank)


def fault_of(backend: Backend, call: KernelCall) -> str | None:
    """What a self-test or an earlier call found wrong with `backend` for such calls on this device, or None."""
    if backend.name == "reference":
        return None
    key = backend.name, _without_rows(call)
    if key not in _tested:
        with _testing.setdefault(key, threading.RLock()):
            if key not in _tested:
                _test(backend, call)
    return _tested[key]


def known_fault(backend: Backend, call: KernelCall) -> str | None:
    """The same, as far as it is known already: nothing is tested for it"""
    return _tested.get((backend.name, _without_rows(call)))


def _test(backend: Backend, call: KernelCall, *tested: tuple[int, Sample]) -> None:
    found = None
    if call.device.type != "cpu":  # what runs there besides the reference is an interpreter
        found = self_test(backend, call, tested)
    if found is not None:
        turn_off(backend, call, found)
    _tested.setdefault((backend.name, _without_rows(call)), None)


def try_out(sample: Sample, device: torch.device, dtype: torch.dtype, compute: str, rows: int) -> None:
    """Run what would be chosen for layers like `sample`, with so many rows: it is compiled and compared then.

    What fails is turned off, and what takes its place is tried.
    """
    spec = sample.spec
    while True:
        choice = _choose(spec, device, dtype, compute, bucket(rows), known_fault)
        if choice.backend.name == "reference":
            return
        call = call_of(spec, device, dtype, choice.compute)
        with _testing.setdefault((choice.backend.name, call), threading.RLock()):
            _test(choice.backend, call, (rows, sample))
        if known_fault(choice.backend, call) is None:
            return


def turn_off(backend: Backend, call: KernelCall, reason: str) -> None:
    """Never choose this backend for such calls again in this process; says so once, in the log."""
    global _turned_off
    _turned_off += 1
    key = backend.name, _without_rows(call)
    if _tested.get(key) is None:
        _tested[key] = f"{call.compute} is off: {reason}"
        log.warning(
            "%s kernels: %s of %s on %s is off: %s", backend.name, call.compute, call.format, call.device, reason
        )
    _chosen.clear()


def call_of(spec: LayerSpec, device: torch.device, dtype: torch.dtype, compute: str) -> KernelCall:
    """What `turn_off` needs to know of a layer, in a mode that was chosen for it."""
    return _without_rows(KernelCall(spec.format, device, dtype, compute, partly_unsigned=spec.partly_unsigned))


@contextmanager
def by_reference() -> Iterator[None]:
    """Layers inside run by the reference, each in the mode that was chosen for it: what they should have given."""
    before = _by_reference.set(True)
    try:
        yield
    finally:
        _by_reference.reset(before)


def _without_rows(call: KernelCall) -> KernelCall:
    return replace(call, rows=0, capability=None, arch="", asked=False, measured=False)


def run(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: Lora | None,
    compute: str,
    activation: str = "",
) -> torch.Tensor:
    """One layer on x (M, K) by the chosen backend; one that fails is turned off and the next takes over."""
    spec = layer.spec
    while True:
        choice = choose(spec, x.device, x.dtype, compute, x.shape[0])
        backend = discover()[0]["reference"] if _by_reference.get() else choice.backend
        if layer.order != backend.order(spec, choice.compute):
            layer = layer.in_order("")
        try:
            return backend.linear(x, layer, bias, lora, choice.compute, activation)
        except torch.cuda.OutOfMemoryError:
            raise  # the host makes room and tries again
        except Exception as error:
            if backend.name == "reference":
                raise
            turn_off(backend, call_of(spec, x.device, x.dtype, choice.compute), f"{type(error).__name__}: {error}")


def prepare(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, compute: str, activation: str = ""
) -> Run:
    """What runs this call and all like it, by the backend chosen for it. It is of use until `turned_off` is another."""
    choice = choose(layer.spec, x.device, x.dtype, compute, x.shape[0])
    if layer.order and layer.order != choice.backend.order(layer.spec, choice.compute):
        natural = prepare(x, layer.in_order(""), bias, lora, compute, activation)
        return lambda x, layer, bias, lora: natural(x, layer.in_order(""), bias, lora)
    return choice.backend.prepare(x, layer, bias, lora, choice.compute, activation)


def turned_off() -> int:
    """How often a backend was turned off: what was prepared before may be the work of that one"""
    return _turned_off


def is_by_reference() -> bool:
    return _by_reference.get()
