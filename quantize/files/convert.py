"""One dialect into another: the same numbers, spelled differently. A layer at a time, and whole or not at all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import CheckpointError, new_checkpoint
from .dialects import DIALECTS, Save
from .dialects.native import NAME as NATIVE
from .lifecycle import naming_a_full_disk
from .open import open_checkpoint

WRITERS: dict[str, Save] = {name: dialect.save for name, dialect in DIALECTS.items() if dialect.save is not None}
TARGETS = (NATIVE, *(name for name in WRITERS if name != NATIVE))  # the pack's own first: it holds everything
Progress = Callable[[int, int, str], None]
"""progress(done, total, layer): called before each layer; raise from it to stop, nothing is then left on disk"""


@dataclass(frozen=True)
class ConvertReport:
    """What a run did; `notes` are the places where the new dialect holds something differently."""

    path: Path
    source_dialect: str
    dialect: str
    family: str
    layers: int
    notes: tuple[str, ...]


def convert_file(
    source: str | Path, target: str | Path, to: str, as_is: bool = False, progress: Progress | None = None
) -> ConvertReport:
    """Write the 4-bit model `source` (a file or a folder) as `target` in the dialect `to`.

    as_is   keep layer names, each layer on its own: no family is needed, nothing is joined, split or reordered
    raises  CheckpointError naming file, layer and reason, whatever `progress` raises, and OSError;
            in every such case `target` is as it was before

        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from svdquant_pack.quantize.files.source import FileSource
        >>> from svdquant_pack.quantize.maker.model import quantize_model
        >>> from svdquant_pack.quantize.recipe import Recipe
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     wide, path = f"{folder}/wide.safetensors", f"{folder}/4bit.safetensors"
        ...     save_file({"blocks.0.proj.weight": torch.randn(256, 128), "head.weight": torch.randn(8, 128)}, wide)
        ...     _ = quantize_model(FileSource(wide), path, Recipe(rank=16))
        ...     report = convert_file(path, f"{folder}/kitchen.safetensors", to="kitchen")
        >>> report.source_dialect, report.dialect, report.layers, report.notes
        ('native', 'kitchen', 1, ())
    """
    if to not in TARGETS:
        raise CheckpointError(f"{to!r} is no dialect to write, known are {', '.join(TARGETS)}")
    source, target = Path(source), Path(target)
    if target.is_dir() or (target.exists() and target.samefile(source)):
        raise CheckpointError(f"{target}: is the source or a folder; needed the name of a new file")
    checkpoint = open_checkpoint(source, as_is)
    done, total = 0, len(checkpoint.specs)

    def step(layer: str) -> None:
        nonlocal done
        if progress is not None:
            progress(min(done, total), total, layer)
        done += 1

    new = new_checkpoint(target, checkpoint.specs.values(), checkpoint.rest.values())
    with naming_a_full_disk(target), new as writer:
        notes = WRITERS[to](checkpoint, writer, as_is, step)
    if progress is not None:
        progress(total, total, "")
    return ConvertReport(target, checkpoint.dialect, to, checkpoint.provenance.family, total, tuple(notes))
