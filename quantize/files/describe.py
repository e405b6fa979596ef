"""What is in a checkpoint, as plain data: for the command line and the model-info node."""

from collections import Counter
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .open import open_checkpoint
from .tensor_file import size_on_disk


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Family, dialect, formats, ranks and bytes of an opened checkpoint; only the header is looked at."""
    specs = checkpoint.specs.values()
    dense = sum(spec.bytes_16bit() for spec in specs)
    rest = sum(info.nbytes for info in checkpoint.rest.values())
    size = size_on_disk(checkpoint.path)
    return {
        "file": checkpoint.path.name,
        "dialect": checkpoint.dialect,
        "family": checkpoint.provenance.family,
        "formats": dict(Counter(spec.format for spec in specs)),
        "ranks": dict(Counter(str(spec.rank) for spec in specs if spec.fmt.low_rank)),
        "layers": {
            name: {
                "format": spec.format,
                "shape": [spec.n, spec.k],
                "rank": spec.rank,
                "unsigned": list(spec.act_unsigned),
            }
            for name, spec in checkpoint.specs.items()
        },
        "bytes": size,
        "bytes_16bit": dense + rest,
        "ratio": round((dense + rest) / size, 3),
        "recipe": dict(checkpoint.provenance.recipe),
        "source_hash": checkpoint.provenance.source_hash,
        "pinned": list(checkpoint.provenance.pinned),
        "notes": list(checkpoint.notes),
    }


def inspect_file(path: str | Path) -> dict[str, Any]:
    """`describe` of a file or a folder of files. Raises CheckpointError for anything that is not a 4-bit model.

    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> from svdquant_pack.quantize.files.source import FileSource
    >>> from svdquant_pack.quantize.maker.model import quantize_model
    >>> from svdquant_pack.quantize.recipe import Recipe
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     wide, path = f"{folder}/wide.safetensors", f"{folder}/4bit.safetensors"
    ...     save_file({"blocks.0.proj.weight": torch.randn(256, 128), "head.weight": torch.randn(8, 128)}, wide)
    ...     _ = quantize_model(FileSource(wide), path, Recipe(rank=16))
    ...     found = inspect_file(path)
    >>> found["dialect"], found["family"], found["formats"], found["ranks"]
    ('native', 'generic', {'int4': 1}, {'16': 1})
    """
    return describe(open_checkpoint(path))
