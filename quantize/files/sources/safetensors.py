"""One safetensors file, or all of several shards `X-00001-of-0000N.safetensors` of which one was given."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..dialects import speaking
from ..encodings.fp8 import FP8
from ..tensor_file import TensorFile, TensorFileError
from ..tensors import together
from . import SourceKind

SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def open_file(path: Path) -> TensorFile:
    return open_files(path, shards(path))


def open_files(path: Path, files: Sequence[Path]) -> TensorFile:
    """All of `files` as the one model that `path` stands for. Raises TensorFileError where it is 4-bit already."""
    opened = [TensorFile(file) for file in files]
    for file in opened:
        if any(key.endswith(".weight") and info.dtype in FP8 for key, info in file.infos.items()):
            continue  # such files may carry the markers of a 4-bit dialect
        for dialect in speaking(file):
            raise TensorFileError(f"{path.name}: is a 4-bit model already ({dialect.name}), needed a 16-bit one")
    return together(path, opened)


def shards(path: Path) -> list[Path]:
    """All files of the model that `path` is one of. Raises TensorFileError that names the first missing one."""
    match = SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    base, _, count = match.groups()
    found = [path.with_name(f"{base}-{i:05d}-of-{count}.safetensors") for i in range(1, int(count) + 1)]
    for file in found:
        if not file.is_file():
            raise TensorFileError(f"{path.name}: is one of {int(count)} files, and {file.name} is not beside it")
    return found


KIND = SourceKind("safetensors", lambda path, head: head[8:9] == b"{", open_file)
