"""When a node that writes a file has to run again, for the host's cache: what it reads or what it wrote has changed.

The host compares what IS_CHANGED says before a run with what it said before the last one. A run that writes its own
target must not count as a change, so what was written is remembered: a target is unchanged while it is the file that
the node wrote from the same inputs, or is not there and never was.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...quantize.files.sources.folder import COMPONENTS
from ...quantize.files.tensor_file import folder_files
from .files import FOLDER, NO_FILE, find, find_source, refuse_name, statistics_folder, target

Fingerprint = tuple[tuple[str, int, int], ...]
"""(path, bytes, nanoseconds of the last change) of every file of a model; empty if there is none"""


def fingerprint(path: Path | None) -> Fingerprint:
    """Of a file, or of all files of a model in a folder."""
    if path is None or not path.exists():
        return ()
    found = []
    for file in _files(path) if path.is_dir() else [path]:
        state = file.stat()
        found.append((str(file), state.st_size, state.st_mtime_ns))
    return tuple(found)


def _files(folder: Path) -> list[Path]:
    components = (file for name in COMPONENTS for file in folder.glob(f"{name}*/*"))
    return folder_files(folder) or sorted(file for file in (*folder.iterdir(), *components) if file.is_file())


def fingerprint_of_source(name: str | None) -> Fingerprint:
    """Of what can be quantized."""
    return fingerprint(find_source(name)) if name else ()


def fingerprint_of_model(model_name: str | None) -> Fingerprint:
    """Of one of the host's diffusion models; empty for None, which stands for what another node gives."""
    return fingerprint(find(model_name)) if model_name else ()


def fingerprint_of_statistics(name: str | None) -> Fingerprint:
    """Of one of the statistics that a user may choose."""
    return fingerprint(statistics_folder() / Path(name).name) if name and name != NO_FILE else ()


def target_of(file_name: str | None, kind: str = FOLDER) -> Path | None:
    """Where a node of this `file_name` writes; None where another node names it, and for what is no name."""
    return None if file_name is None or refuse_name(file_name) else target(file_name, overwrite=True, kind=kind)


@dataclass(frozen=True)
class Left:
    """A target as a run left it: the file, the node's inputs, and the turn that IS_CHANGED had named."""

    file: Fingerprint
    inputs: str
    turn: int


class Targets:
    """The targets of this process. A file that lies there of an earlier one is somebody else's."""

    def __init__(self) -> None:
        self._left: dict[Path, Left] = {}
        self._asked: dict[Path, str] = {}

    def turn(self, path: Path, inputs: Mapping[str, Any]) -> int:
        """The same number for as long as `path` is what a node with these `inputs` wrote, else another."""
        self._asked[path] = repr(sorted(inputs.items()))
        return self._turn(path)

    def _turn(self, path: Path) -> int:
        asked = self._asked.get(path, "")
        left = self._left.get(path, Left((), asked, 0))
        return left.turn + (left.file != fingerprint(path) or left.inputs != asked)

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Around what writes `path`: remembers it, unless that fails."""
        turn = self._turn(path)
        yield
        self._left[path] = Left(fingerprint(path), self._asked.get(path, ""), turn)


WRITTEN = Targets()


def changed(reads: Iterable[Fingerprint], path: Path | None, inputs: Mapping[str, Any]) -> str:
    """What IS_CHANGED says of a node that reads these files and writes `path`; None where another node names it."""
    return repr((*reads, None if path is None else WRITTEN.turn(path, inputs)))
