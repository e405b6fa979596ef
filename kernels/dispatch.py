"""Which backend runs a call in which mode, and why the others do not."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from .backends import Backend, Call, discover
from .layer import Layer
from .modes import COMPUTES, candidates
from .self_test import self_test
from .stages import activate, weighted

log = logging.getLogger("svdquant")
USUAL_ROWS = 4096  # a 1024 x 1024 image of a transformer
_tested: dict[tuple[str, Call], str | None] = {}
_chosen: dict[tuple[Any, ...], "Choice"] = {}


@dataclass(frozen=True)
class Choice:
    """The backend that runs a layer, the compute mode, and one reason per backend that does not."""

    backend: Backend
    compute: str
    passed_over: dict[str, str]


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
    return next((limit for limit in (128, 768) if rows <= limit), USUAL_ROWS)


def choose(
    format: str,
    device: torch.device,
    dtype: torch.dtype,
    compute: str = "auto",
    rows: int = USUAL_ROWS,
    partly_unsigned: bool = False,
    act_bits: int = 4,
) -> Choice:
    """The best mode of the table that a backend runs there. Raises ValueError with every reason if there is none."""
    key = format, device, dtype, compute, bucket(rows), partly_unsigned, act_bits
    if key not in _chosen:
        _chosen[key] = _choose(*key)
    return _chosen[key]


def _choose(
    format: str,
    device: torch.device,
    dtype: torch.dtype,
    compute: str,
    rows: int,
    partly_unsigned: bool,
    act_bits: int,
) -> Choice:
    if compute not in COMPUTES:
        raise ValueError(f"compute is {compute!r}, known are {', '.join(COMPUTES)}")
    arch, capability = arch_of(device)
    backends, absent = discover()
    reasons = dict(absent)
    for rule in candidates(format, arch, compute, rows, act_bits):
        call = Call(format, device, dtype, rule.compute, capability, arch, rows, partly_unsigned)
        for backend in sorted(backends.values(), key=lambda backend: -backend.priority):
            if rule.backends and backend.name not in rule.backends:
                continue
            reason = refusal(backend, call)
            if reason is None:
                return Choice(
                    backend, rule.compute, {name: why for name, why in reasons.items() if name != backend.name}
                )
            reasons[backend.name] = reason
    lines = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"no kernel backend runs {format} on {device} in {dtype} with compute={compute}: {lines}")


def computes_of(format: str) -> tuple[str, ...]:
    """What may be asked of layers of this format on any device: what the reference has, which is the definition"""
    if format == "awq_w4a16":
        return COMPUTES  # it has one way to compute, whatever is asked for
    refuses = discover()[0]["reference"].refuses
    device, dtype = torch.device("cpu"), torch.float32
    return tuple(each for each in COMPUTES if each == "auto" or refuses(Call(format, device, dtype, each)) is None)


def refusal(backend: Backend, call: Call) -> str | None:
    """Why `backend` does not run `call`: what it says itself, or what its self-test found on this device."""
    reason = backend.refuses(call)
    if reason is not None or backend.name == "reference":
        return reason
    key = backend.name, _without_rows(call)
    if key not in _tested:
        _tested[key] = None  # the test itself must not ask again
        if call.device.type != "cpu":  # what runs there besides the reference is an interpreter
            found = self_test(backend, call)
            if found is not None:
                turn_off(backend, call, found)
    return _tested[key]


def turn_off(backend: Backend, call: Call, reason: str) -> None:
    """Never choose this backend for such calls again in this process; says so once, in the log."""
    key = backend.name, _without_rows(call)
    if _tested.get(key) is None:
        _tested[key] = f"{call.compute} is off: {reason}"
        log.warning(
            "%s kernels: %s of %s on %s is off: %s", backend.name, call.compute, call.format, call.device, reason
        )
    _chosen.clear()


def _without_rows(call: Call) -> Call:
    return replace(call, rows=0, capability=None, arch="")


def run(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: tuple[torch.Tensor, torch.Tensor] | None,
    compute: str,
    lora_strength: torch.Tensor | None = None,
    activation: str = "",
) -> torch.Tensor:
    """One layer on x (M, K) by the chosen backend; one that fails is turned off and the next takes over."""
    format, unsigned = layer.spec.format, layer.spec.act_unsigned
    partly = unsigned not in ((0, 0), (0, layer.spec.k))
    while True:
        choice = choose(format, x.device, x.dtype, compute, x.shape[0], partly, layer.spec.act_bits)
        backend, arguments = choice.backend, (x, layer, bias, lora, choice.compute)
        try:
            if backend.epilogue:
                return backend.linear(*arguments, lora_strength=lora_strength, activation=activation)
            return _with_epilogue(backend, arguments, lora_strength, activation)
        except torch.cuda.OutOfMemoryError:
            raise  # the host makes room and tries again
        except Exception as error:
            if backend.name == "reference":
                raise
            call = Call(format, x.device, x.dtype, choice.compute, partly_unsigned=partly)
            turn_off(backend, call, f"{type(error).__name__}: {error}")


def _with_epilogue(
    backend: Backend, arguments: tuple[Any, ...], lora_strength: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """The epilogue for a backend that has none: strength on lora_down, the activation function after the layer"""
    x, layer, bias, lora, compute = arguments
    if lora is not None:
        lora = weighted(lora[0], lora_strength), lora[1]
    return activate(backend.linear(x, layer, bias, lora, compute), activation)


def stage(name: str, format: str, device: torch.device, dtype: torch.dtype, compute: str) -> Callable[..., Any]:
    """The single step `name` (see kernels/stages.py) of the best backend that would run `compute` on this device."""
    arch, capability = arch_of(device)
    call = Call(format, device, dtype, compute, capability, arch)
    backends, _ = discover()
    reasons = []
    for backend in sorted(backends.values(), key=lambda backend: -backend.priority):
        if name in backend.stages:
            reason = refusal(backend, call)
            if reason is None:
                return backend.stages[name]
            reasons.append(f"{backend.name}: {reason}")
    raise ValueError(f"no kernel backend has {name} for {format} on {device} in {dtype}: {'; '.join(reasons)}")
