"""Which backend and mode was the fastest here, by kind of layer: kept on disk for later processes.

    {"<GPU>": {"driver": ..., "torch": ..., "triton": ..., "pack": ..., "layers": [a Measured, ...]}}

Only compute=measured asks; what else a layer may be asked for is decided by tables alone. The file is read once in a
process, so that pictures do not change between runs. It is used as a whole or not at all: with another driver, torch,
Triton or version of the pack its times say nothing.
"""

import ctypes
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from .backends.triton import tuned, versions
from .bounded_json import is_kind, kind_name, read_object
from .formats import FORMATS
from .layer import LayerSpec
from .modes import FEW, SOME, USUAL_ROWS
from .self_test import TOLERANCE

log = logging.getLogger("svdquant")
NAME = "measured.json"
ROWS = (FEW, SOME, USUAL_ROWS)
FACTS = ("driver", "torch", "triton", "pack")
AGAIN = "load with compute=measured, or run `python -m quantize tune`, to measure again"

Write = Callable[[Path, bytes], object]


@dataclass(frozen=True)
class Kind:
    """What layers have in common that take the same time, but for the rank; `rows` is one of ROWS."""

    format: str
    partly_unsigned: bool
    act_bits: int
    n: int
    k: int
    dtype: str
    rows: int

    @classmethod
    def of(cls, spec: LayerSpec, dtype: torch.dtype, rows: int) -> "Kind":
        return cls(*spec.kind, spec.n, spec.k, str(dtype).removeprefix("torch."), rows)


@dataclass(frozen=True)
class Timed:
    """Seconds of one call, and its relative error against the reference in the same mode."""

    backend: str
    compute: str
    seconds: float
    error: float

    @property
    def name(self) -> str:
        return f"{self.backend} {self.compute}"


@dataclass(frozen=True)
class Measured:
    """The backend and mode that run such layers.

    timed     every way that gave the right numbers, what the tables choose first
    left_out  {backend and mode: why it has no time}
    """

    kind: Kind
    backend: str
    compute: str
    date: str
    timed: tuple[Timed, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> Timed:
        """The way that runs"""
        return next(each for each in self.timed if (each.backend, each.compute) == (self.backend, self.compute))

    @property
    def tabled(self) -> Timed:
        """The way that would run without having been measured"""
        return self.timed[0]


def path() -> Path:
    """measured.json beside the tuned launch settings"""
    return tuned.path().with_name(NAME)


@cache
def device_name(device: torch.device) -> str:
    """The GPU's name, or what torch knows of the processor and how many threads it uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()} x {torch.get_num_threads()}"


@cache
def facts(device: torch.device) -> dict[str, str]:
    """{each of FACTS: what is here now}"""
    driver = _driver() if device.type == "cuda" else "none"
    found = (driver, torch.__version__, versions.installed() or "none", _pack())
    return dict(zip(FACTS, found, strict=True))


def _pack() -> str:
    """A stamp of the kernels themselves: others take other times"""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(each for each in folder.rglob("*") if each.suffix in (".py", ".json")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    """The version of NVIDIA's driver; of AMD's what torch is made with, as that has no library to ask"""
    if torch.version.hip:
        return f"hip {torch.version.hip}"
    try:
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(80)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) == 0:
            return text.value.decode(errors="replace")
    except (OSError, AttributeError):  # a container that hides it
        pass
    return f"cuda {torch.version.cuda}"


@cache
def known(device: torch.device) -> tuple[dict[Kind, Measured], str]:
    """(what was measured on this device, why what there is is not used); one line in the log for the latter"""
    try:
        found = _read().get(device_name(device))
        if found is None:
            return {}, ""
        now = facts(device)
        other = [f"{name} {found[name]:.60}, now {now[name]}" for name in FACTS if found[name] != now[name]]
        if not other:
            return {each.kind: each for each in map(_parsed, found["layers"])}, ""
        why = f"they were measured with {' and '.join(other)}"
    except (OSError, ValueError) as error:
        why = str(error)
    log.warning("measured choices of kernels are not used: %s. %s", why, AGAIN.capitalize())
    return {}, why


def find(spec: LayerSpec, device: torch.device, dtype: torch.dtype, rows: int) -> Measured | None:
    """What runs such layers, if that was measured here. `rows` is one of ROWS."""
    return known(device)[0].get(Kind.of(spec, dtype, rows))


def save(found: Iterable[Measured], device: torch.device, write: Write) -> Path:
    """Put `found` into the file, beside what else was measured on this device with the same driver and versions.

    write  puts bytes into a file, all of them or none
    """
    here = known(device)[0] | {each.kind: each for each in found}
    try:
        whole = _read()
    except (OSError, ValueError):  # damaged: nothing in it is used
        whole = {}
    whole[device_name(device)] = {**facts(device), "layers": [asdict(each) for each in here.values()]}
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, json.dumps(whole, indent=1).encode())
    known.cache_clear()
    return target


def _read() -> dict[str, dict[str, Any]]:
    """The whole file, {} if there is none. Raises OSError or ValueError."""
    try:
        text = path().read_bytes()
    except (FileNotFoundError, RuntimeError):  # RuntimeError: a user without a home folder
        return {}
    found = read_object(text, str(path()))
    for name, here in found.items():
        _fits(here, {**dict.fromkeys(FACTS, str), "layers": list}, f"{path()}: {name!r:.60}")
    return found


def _fits(found: Any, kinds: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    """Raise ValueError unless `found` has exactly these keys, with values of these types."""
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        raise ValueError(f"{where} does not hold {', '.join(kinds)}")
    for key, kind in kinds.items():
        if not is_kind(found[key], kind):
            raise ValueError(f"{where}: {key} is {found[key]!r:.40}, needed {kind_name(kind)}")


def _fields(of: type, **others: type) -> dict[str, type | tuple[type, ...]]:
    """{field of a dataclass: type of its value}; whole numbers are real ones"""
    kinds = {each.name: others.get(each.name, each.type) for each in fields(of)}
    return {name: (int, float) if kind is float else cast(type, kind) for name, kind in kinds.items()}


def _parsed(found: Any) -> Measured:
    """An entry of the file. Raises ValueError for one that no run has written."""
    where = f"{path()}: an entry of layers"
    _fits(found, _fields(Measured, kind=dict, timed=list, left_out=dict), where)
    _fits(found["kind"], _fields(Kind), f"{where}, kind")
    for each in found["timed"]:
        _fits(each, _fields(Timed), f"{where}, timed")
    left_out = found["left_out"]
    if not all(isinstance(why, str) and len(name.split()) == 2 for name, why in left_out.items()):
        raise ValueError(f"{where}: left_out is {left_out!r:.80}, needed a text for each backend and mode")
    timed = tuple(Timed(**each) for each in found["timed"])
    entry = Measured(Kind(**found["kind"]), found["backend"], found["compute"], found["date"], timed, left_out)
    right = [each for each in timed if each.seconds > 0 and 0 <= each.error <= TOLERANCE]
    if entry.kind.rows not in ROWS or entry.kind.format not in FORMATS or len(right) != len(timed):
        raise ValueError(f"{where} is of {entry.kind}, with times {timed!r:.200}: no run has written that")
    if (entry.backend, entry.compute) not in {(each.backend, each.compute) for each in timed}:
        raise ValueError(f"{where} says {entry.backend} {entry.compute}, which is not among what it timed")
    return entry
