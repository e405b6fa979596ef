"""Open a 4-bit model of any dialect."""

from dataclasses import replace
from pathlib import Path

from ..families import FAMILIES
from .checkpoint import Checkpoint, CheckpointError
from .dialects import detect, speaking
from .part import model_part
from .tensor_file import TensorFileError, open_tensors


def open_checkpoint(path: str | Path, as_is: bool = False) -> Checkpoint:
    """Open a 4-bit model of any dialect, a file or a folder of files; only the header and a few vectors are read.

    Of a whole checkpoint it is the diffusion model.

    as_is   keep the file's own layer names, each layer on its own: what no model family is needed for
    raises  CheckpointError for a file that is damaged, not a 4-bit model, or of an unknown family or format

        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from svdquant_pack.quantize.files.source import FileSource
        >>> from svdquant_pack.quantize.maker.model import quantize_model
        >>> from svdquant_pack.quantize.recipe import Recipe
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     wide, path = f"{folder}/wide.safetensors", f"{folder}/4bit.safetensors"
        ...     save_file({"blocks.0.proj.weight": torch.randn(256, 128), "head.weight": torch.randn(8, 128)}, wide)
        ...     _ = quantize_model(FileSource(wide), path, Recipe(rank=16))
        ...     checkpoint = open_checkpoint(path)
        ...     layer = checkpoint.layer("blocks.0.proj")  # read here
        >>> checkpoint.dialect, list(checkpoint.specs), list(checkpoint.rest)
        ('native', ['blocks.0.proj'], ['head.weight'])
        >>> layer.spec.where, layer.nbytes()
        ('int4 at N=256, K=128, rank 16', 29952)
    """
    try:
        file = model_part(open_tensors(path))
        dialect = detect(file)
        checkpoint = (dialect.open_as_is or dialect.open)(file) if as_is else dialect.open(file)
    except TensorFileError as error:
        raise CheckpointError(str(error)) from error
    family = checkpoint.provenance.family
    if family not in FAMILIES:
        raise CheckpointError(
            f"{checkpoint.path.name}: family {family!r} is unknown, known are {', '.join(sorted(FAMILIES))}. "
            "A newer version of this pack may know it."
        )
    return _canonical(checkpoint)


def is_4bit(path: str | Path) -> bool:
    """Whether a file or a folder is a 4-bit model of some dialect; one that is damaged, or of no tensors, is none."""
    try:
        return bool(speaking(model_part(open_tensors(path))))
    except TensorFileError:
        return False


def _canonical(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with tensors of `rest` under the names that every ComfyUI reads: its host wrote those it has."""
    family = FAMILIES[checkpoint.provenance.family]
    stored = {family.canonical(name): name for name in checkpoint.rest}
    if stored.keys() == checkpoint.rest.keys():
        return checkpoint
    rest = {name: checkpoint.rest[old] for name, old in stored.items()}
    return replace(checkpoint, rest=rest, _read_rest=lambda name: checkpoint.tensor(stored[name]))
