"""Statistics files as a whole: merged, described, sized."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.lifecycle import naming_a_full_disk, temporary_for
from .file import ReadEntries, Statistics, StatisticsError


def merge(paths: Sequence[str | Path], target: str | Path) -> Statistics:
    """One file with what several runs of the same model saw.

    raises  StatisticsError if the files' layers or widths differ, or a run is in two of them
    """
    files = [Statistics.open(path) for path in paths]
    widths = files[0].widths
    runs: list[dict[str, Any]] = []
    for file in files:
        if file.widths != widths:
            raise StatisticsError(f"{file.path.name} and {files[0].path.name} are statistics of different models")
        for run in file.metadata.get("runs", []):
            if any(run["id"] == other["id"] for other in runs):
                raise StatisticsError(f"{file.path.name}: holds a run that another file holds too; counted once only")
            runs.append(run)
    room = max(file.room for file in files)
    target = Path(target)
    temporary = temporary_for(target)
    try:
        with naming_a_full_disk(target):
            _fill(Statistics.create(temporary, widths, room, {**files[0].metadata, "runs": runs}), files)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return Statistics.open(target)


def _fill(merged: Statistics, files: Sequence[Statistics]) -> None:
    for file in files:
        for layer, entry in file.entries.items():
            merged.entries[layer].merge(entry)
    merged.save()


def describe(path: str | Path) -> dict[str, Any]:
    """What a statistics file holds, as plain data."""
    file = Statistics.open(path)
    layers = {layer: _describe_entry(file.stored, layer) for layer in file.stored}
    return {
        "file": file.path.name,
        "kind": "statistics",
        "family": file.metadata.get("family", ""),
        "runs": file.metadata.get("runs", []),
        "finished": file.finished,
        "layers": layers,
        "measured_sensitivity": sum(bool(file.stored.part(layer, "sensitivity")[1]) for layer in file.stored),
        "bytes": file.path.stat().st_size,
    }


def _describe_entry(stored: ReadEntries, layer: str) -> dict[str, Any]:
    """All but the tokens is small."""
    key, hold, count, absmax = (stored.part(layer, part) for part in ("key", "hold", "count", "absmax"))
    return {
        "channels": absmax.shape[1],
        "tokens": int((key > 0).sum()),
        "hold_out": int(hold[key > 0].sum()),
        "seen": int(count.sum()),
        "absmax": absmax.amax().item(),
    }


def tokens_for(widths: Mapping[str, int], wanted: int, disk: int) -> int:
    """Tokens per layer: `wanted`, or as many as `disk` bytes hold."""
    return max(64, min(wanted, disk // max(1, 2 * sum(widths.values()))))
