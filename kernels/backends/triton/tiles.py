"""Launch settings as data: tiles.json, by kernel, GPU and rows. Nothing is tuned while a model runs.

A new resolution compiles nothing: rows are looked up by bucket, and no kernel is specialized on their number. Who asks
for it has the entries of his own GPU replaced, see tune.py: as many as before, by settings that are known here.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from ...bounded_json import read_json
from . import tuned

log = logging.getLogger("svdquant")
Settings = Mapping[str, Any]
Place = tuple[str, int]  # kernel, index of an entry in its list
WHERE = ("arch", "rows")  # what an entry is for; the rest are its settings
LARGEST = 1 << 20  # rows; every bucket above is treated like it


@cache
def table() -> dict[str, list[dict[str, Any]]]:
    return read_json(Path(__file__).with_name("tiles.json").read_text(), "tiles.json")


@cache
def arch_of(device: torch.device) -> str:
    """sm_90, gfx942, ...; "" for the interpreter on a CPU"""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def has_asm(arch: str) -> bool:
    """Whether kernels may hold PTX instructions: not on AMD, not in the interpreter"""
    return arch.startswith("sm_")


def multiplies_16bit(arch: str) -> bool:
    """Whether Triton has tensor cores for 16 bit there: not on Turing"""
    return arch != "sm_75"


def converts_e2m1(arch: str) -> bool:
    """Whether PTX has cvt.e2m1x2 there: on all of Blackwell"""
    return arch.startswith(("sm_10", "sm_11", "sm_12"))


def bucket(rows: int) -> int:
    """Rows rounded up to a power of four from 16 on: what settings are looked up by"""
    size = 16
    while size < min(rows, LARGEST):
        size *= 4
    return size


def entry(kernel: str, arch: str, rows: int) -> int:
    """Index in the kernel's list of the first entry whose arch is a prefix and that takes so many rows."""
    for index, found in enumerate(table()[kernel]):
        if arch.startswith(found["arch"]) and (found["rows"] is None or bucket(rows) <= found["rows"]):
            return index
    raise LookupError(f"tiles.json has no {kernel} for {arch} and {rows} rows")


@cache
def as_shipped(kernel: str, index: int) -> dict[str, Any]:
    """The settings in one entry of tiles.json; not to be changed"""
    return {key: value for key, value in table()[kernel][index].items() if key not in WHERE}


def settings(kernel: str, device: torch.device, rows: int) -> dict[str, Any]:
    """Tile sizes and launch options of one call; the caller's own copy."""
    place = kernel, entry(kernel, arch_of(device), rows)
    if _trials:
        chosen, asked = _trials[-1]
        asked.add(place)
    else:
        chosen = tuned_here(machine(device))
    return dict(chosen.get(place) or as_shipped(*place))


_trials: list[tuple[Mapping[Place, Settings], set[Place]]] = []


@contextlib.contextmanager
def trying(chosen: Mapping[Place, Settings]) -> Iterator[set[Place]]:
    """Inside the block `chosen` goes before tiles.json, and no tuned file counts. Yields what was launched there."""
    asked: set[Place] = set()
    _trials.append((chosen, asked))
    try:
        yield asked
    finally:
        _trials.pop()


def choices(kernel: str) -> list[dict[str, Any]]:
    """All settings that a kernel may be launched with: what is shipped for any GPU, and candidates.json"""
    more = read_json(Path(__file__).with_name("candidates.json").read_text(), "candidates.json")[kernel]
    found = []
    for settings in [*(as_shipped(kernel, index) for index in range(len(table()[kernel]))), *more]:
        if settings not in found:
            found.append(settings)
    return found


@cache
def machine(device: torch.device) -> str:
    """What tuned settings are good for: this GPU with this compiler"""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, triton {triton.__version__}"


@cache
def tuned_here(machine: str) -> dict[Place, dict[str, Any]]:
    """The tuned settings of a machine; none, and one line in the log, where the file is not usable"""
    try:
        return dict(_known(kernel, each) for kernel, found in tuned.read().get(machine, {}).items() for each in found)
    except (OSError, ValueError) as error:
        log.warning("tuned launch settings are not used: %s. `python -m quantize tune` writes them anew", error)
        return {}


def _known(kernel: str, found: Mapping[str, Any]) -> tuple[Place, dict[str, Any]]:
    """An entry of the tuned file. Raises ValueError if it replaces no entry of tiles.json by settings of `choices`."""
    options = {key: value for key, value in found.items() if key not in WHERE}
    for index, shipped in enumerate(table().get(kernel, ())):
        if all(key in found and found[key] == shipped[key] for key in WHERE) and options in choices(kernel):
            return (kernel, index), options
    raise ValueError(f"this version of the pack has no {kernel} with {dict(found)}")
