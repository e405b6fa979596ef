"""A folder: one component of a Diffusers model, or a whole one, of which the transformer or the UNet is taken."""

from pathlib import Path

from ..tensor_file import DIFFUSERS_FILES, LEGACY_FOLDER, TensorFile, TensorFileError
from . import SourceKind, open_source
from .index import SUFFIX
from .safetensors import SHARD

COMPONENTS = ("transformer", "unet")
SUFFIXES = (".safetensors", ".gguf", ".bin", ".ckpt", ".pt", ".pth")


def open_folder(path: Path) -> TensorFile:
    found = model_file(path)
    try:
        return open_source(found)
    except TensorFileError as error:
        raise TensorFileError(f"{path.name}: {error}") from error


def model_file(path: Path) -> Path:
    """The file that stands for the folder's model: an index, one of its shards, or the only one.

    raises  TensorFileError for none, and for several of which none is the model's by its name
    """
    inner = [path / name for name in COMPONENTS if (path / name).is_dir()]
    second = [folder for folder in path.glob("transformer_*") if folder.is_dir()]
    if inner and second:
        raise TensorFileError(
            f"{path.name}: holds two models, {inner[0].name} and {second[0].name}: give the folder of one of them, "
            "then of the other"
        )
    if inner:
        return model_file(inner[0])
    if all((path / name).is_file() for name in LEGACY_FOLDER):
        raise TensorFileError(f"{path.name}: is a 4-bit model already (nunchaku), needed a 16-bit one")
    indexes = sorted(path.glob(f"*.safetensors{SUFFIX}"))
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    whole = [file for file in files if SHARD.fullmatch(file.name) is None]
    candidates = indexes or _plain(whole) or [file for file in files if file.name.find("-00001-of-") > 0]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise TensorFileError(
            f"{path.name}: is a folder without a model: neither {' nor '.join(COMPONENTS)}, nor {DIFFUSERS_FILES} are "
            "in it. Give a model's file, or its folder"
        )
    raise TensorFileError(
        f"{path.name}: is a folder of several models ({', '.join(file.name for file in candidates[:4])}): give one file"
    )


def _plain(files: list[Path]) -> list[Path]:
    """Of Diffusers' spellings of one model the first without a variant in its name (`.fp16`), else all."""
    named = [file for file in files if file.stem == "diffusion_pytorch_model"]
    return named[:1] or [file for file in files if file.suffix == ".safetensors"] or files


KIND = SourceKind("folder", lambda path, head: path.is_dir(), open_folder)
