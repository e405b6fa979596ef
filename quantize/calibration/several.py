"""Statistics files as a whole: merged, described, sized."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .file import Statistics, StatisticsError


def merge(paths: Sequence[str | Path], target: str | Path) -> Statistics:
    """One file with what several runs of the same model saw.

    raises  StatisticsError if the files' layers or widths differ, or a run is in two of them
    """
    files = [Statistics.open(path) for path in paths]
    widths = {layer: entry.tokens.shape[1] for layer, entry in files[0].entries.items()}
    runs: list[dict[str, Any]] = []
    for file in files:
        found = {layer: entry.tokens.shape[1] for layer, entry in file.entries.items()}
        if found != widths:
            raise StatisticsError(f"{file.path.name} and {files[0].path.name} are statistics of different models")
        for run in file.metadata.get("runs", []):
            if any(run["id"] == other["id"] for other in runs):
                raise StatisticsError(f"{file.path.name}: holds a run that another file holds too; counted once only")
            runs.append(run)
    room = max(len(entry.key) for file in files for entry in file.entries.values())
    merged = Statistics.create(target, widths, room, {**files[0].metadata, "runs": runs})
    for file in files:
        for layer, entry in file.entries.items():
            merged.entries[layer].merge(entry)
    return merged


def describe(path: str | Path) -> dict[str, Any]:
    """What a statistics file holds, as plain data."""
    file = Statistics.open(path)
    entries = file.entries.values()
    return {
        "file": file.path.name,
        "kind": "statistics",
        "family": file.metadata.get("family", ""),
        "runs": file.metadata.get("runs", []),
        "layers": {
            layer: {
                "channels": entry.tokens.shape[1],
                "tokens": entry.kept,
                "hold_out": int(entry.hold[entry.key > 0].sum()),
                "seen": int(entry.count.sum()),
                "absmax": entry.absmax.amax().item(),
            }
            for layer, entry in file.entries.items()
        },
        "measured_sensitivity": sum(bool(entry.sensitivity[1]) for entry in entries),
        "bytes": file.path.stat().st_size,
    }


def tokens_for(widths: Mapping[str, int], wanted: int, disk: int) -> int:
    """Tokens per layer: `wanted`, or as many as `disk` bytes hold."""
    return max(64, min(wanted, disk // max(1, 2 * sum(widths.values()))))
