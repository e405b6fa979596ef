"""The command verify: whether files are what was written, read to the last byte."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...kernels.layer import check_values
from ..calibration.file import Statistics
from ..files.dialects import speaking
from ..files.integrity import ADVICE
from ..files.open import open_checkpoint
from ..files.part import model_part
from ..files.tensor_file import TensorFile, open_tensors
from . import show

Progress = Callable[[int, int, str], None]
Reads = dict[str, Callable[[], object]]
"""what is read -> how; it raises ValueError where it is damaged"""


@dataclass(frozen=True)
class Verdict:
    """What is known of a file. `problems` each name a tensor, layer or header string; none is a good sign."""

    file: str
    kind: str
    tensors: int
    bytes: int
    has_checksums: bool
    problems: tuple[str, ...]

    @property
    def text(self) -> str:
        what = f"{self.file}: {self.kind}, {self.tensors} tensors, {self.bytes:,} bytes"
        if self.problems:
            return "\n".join([f"DAMAGED  {what}", *(f"         {problem}" for problem in self.problems)])
        if self.has_checksums:
            return f"whole    {what}"
        return f"fine     {what}; has no checksums: dtypes, shapes and finite values were checked"


def add_commands(commands: Any) -> None:
    """Add the parser of this command to those of `python -m quantize`."""
    command = commands.add_parser("verify", help="read whole files and say what in them is damaged")
    command.add_argument(
        "files", metavar="FILE", nargs="+", help="a 4-bit model of any dialect, statistics, or a 16-bit model"
    )
    command.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    verdicts = [verify(file, None if arguments.json else show) for file in arguments.files]
    damaged = [verdict.file for verdict in verdicts if verdict.problems]
    result = {"files": [asdict(verdict) for verdict in verdicts], "damaged": damaged}
    return result, "\n".join(verdict.text for verdict in verdicts)


def verify(path: str | Path, progress: Progress | None = None) -> Verdict:
    """Read all of a file, or of a folder of files, and say what is wrong with it. Raises nothing but OSError.

    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"head.weight": torch.tensor([1.0, float("nan")])}, f"{folder}/x.safetensors")
    ...     print(verify(f"{folder}/x.safetensors").text)
    DAMAGED  x.safetensors: 16-bit, 1 tensors, 8 bytes
             head.weight holds NaN or Inf; the file is damaged or was written by a failed run
    """
    path = Path(path)
    try:
        file = open_tensors(path, strict=False)
    except ValueError as error:
        return Verdict(path.name, "unreadable", 0, 0, False, (_short(error, path),))
    kind, problems, reads = "16-bit", dict.fromkeys(file.problems), _all_tensors(file)
    try:
        if "statistics" in file.metadata:
            kind, reads = _statistics(file)
        elif speaking(model_part(file)):
            kind, reads = _model(file)
    except ValueError as error:
        kind = "4-bit" if kind == "16-bit" else kind
        problems.setdefault(_short(error, path))
    for done, (name, read) in enumerate(reads.items()):
        if progress is not None:
            progress(done, len(reads), name)
        try:
            read()
        except ValueError as error:
            problems.setdefault(_short(error, path))
    if progress is not None:
        progress(len(reads), len(reads), path.name)
    size = sum(info.nbytes for info in file.infos.values())
    return Verdict(path.name, kind, len(file), size, file.has_checksums, tuple(problems))


def _all_tensors(file: TensorFile) -> Reads:
    return {name: partial(_read_tensor, file, name) for name in file}


def _read_tensor(file: TensorFile, name: str) -> None:
    check_values({name: file.read(name)})


def _model(file: TensorFile) -> tuple[str, Reads]:
    """Header and shapes now; without checksums then every layer as a loader reads it. Raises CheckpointError."""
    if file.problems:  # no more can be known of it
        return "4-bit", _all_tensors(file)
    checkpoint = open_checkpoint(file.path)
    kind = f"4-bit, {checkpoint.dialect}, {checkpoint.provenance.family}"
    if file.has_checksums:
        return kind, _all_tensors(file)
    layers = {name: partial(checkpoint.layer, name) for name in checkpoint.specs}
    reads = layers | {name: partial(checkpoint.tensor, name) for name in checkpoint.rest}
    return kind, reads | {name: partial(_read_tensor, file, name) for name in model_part(file).others}


def _statistics(file: TensorFile) -> tuple[str, Reads]:
    if file.problems:
        return "statistics", _all_tensors(file)
    statistics = Statistics.open(file.path)
    if file.has_checksums:
        return "statistics", _all_tensors(file)
    kind = "statistics" if statistics.finished else "statistics, unfinished: a run is writing it or was stopped"
    return kind, {layer: partial(statistics.entry, layer) for layer in statistics.stored}


def _short(error: ValueError, path: Path) -> str:
    """The error in a list under the file's name"""
    return str(error).removeprefix(f"{path.name}: ").removesuffix(f". {ADVICE}")
