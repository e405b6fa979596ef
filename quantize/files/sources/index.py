"""An index of shards, `X.safetensors.index.json`: {"weight_map": {tensor: file beside the index}}."""

from pathlib import Path

from ....kernels.bounded_json import JsonError, read_object
from ..names import refuse_file
from ..tensor_file import TensorFile, TensorFileError
from . import SourceKind
from .safetensors import open_files

SUFFIX = ".index.json"


def open_index(path: Path) -> TensorFile:
    """The tensors that the index names, all of them. Raises TensorFileError for what is missing, by name."""
    where = read_index(path)
    files = sorted(set(where.values()))
    for name in files:
        if reason := refuse_file(name):
            raise TensorFileError(f"{path.name}: {name[:200]!r} is no name of a file beside it: {reason}")
        if not path.with_name(name).is_file():
            raise TensorFileError(
                f"{path.name}: names {len(files)} files, and {name} is not beside it: download it into that folder"
            )
    found = open_files(path, [path.with_name(name) for name in files])
    if missing := sorted(where.keys() - found.infos.keys()):
        raise TensorFileError(
            f"{path.name}: {missing[0]} should be in {where[missing[0]]} and is not, with {len(missing)} missing in "
            "all. Index and files are of two versions: download them together"
        )
    return found


def read_index(path: Path) -> dict[str, str]:
    """tensor -> name of its file"""
    try:
        with path.open("rb") as stream:
            text = stream.read((1 << 24) + 1)
        where = read_object(text, path.name, {"weight_map": dict}).get("weight_map", {})
    except (OSError, JsonError) as error:
        raise TensorFileError(f"{path.name}: cannot be read as an index of shards ({error})") from error
    if not where or not all(isinstance(name, str) for name in where.values()):
        raise TensorFileError(
            f"{path.name}: is no index of shards: it has no weight_map of tensors to files. Give the model's file, its "
            f"folder, or the file that ends in .safetensors{SUFFIX}"
        )
    return where


KIND = SourceKind("index", lambda path, head: path.name.endswith(".json") and not path.is_dir(), open_index)
