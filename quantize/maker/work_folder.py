"""Finished layers of a run that may be stopped: what is taken up again when the same run is started a second time.

One `.safetensors` file per group of layers, named by a key over everything that decides its content: recipe, specs,
weights and statistics. A file of another recipe or another model is never found, so nothing has to be compared.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..files.bounded_json import JsonError, read_object
from ..files.tensor_file import TensorFile, TensorFileError, TensorInfo, TensorWriter


def digest(parts: Iterable[str | torch.Tensor]) -> str:
    """sha256 over texts and over names, shapes and bytes of tensors."""
    made = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            made.update(f"{len(part)}:{part}".encode())
        else:
            made.update(f"{part.dtype}{tuple(part.shape)}".encode())
            made.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def _checksum(tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> str:
    """Of everything in an entry: a flipped byte is not taken up into the file."""
    named = [part for name in sorted(tensors) for part in (name, tensors[name])]
    return digest([json.dumps(record, sort_keys=True), *named])


class WorkFolder:
    """The folder of one target file; made when the first layer is kept, gone when the run is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def beside(cls, target: str | Path) -> "WorkFolder":
        target = Path(target)
        return cls(target.with_name(f".{target.name}.work"))

    def find(self, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, record) kept under `key`; None where there is none, or it is not what was kept."""
        try:
            file = TensorFile(self._file(key))
            tensors = {name: file.read(name) for name in file}
            record = read_object(file.metadata.get("record", ""), "record")
        except (TensorFileError, JsonError):
            return None
        return (tensors, record) if file.metadata.get("checksum") == _checksum(tensors, record) else None

    def keep(self, key: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Write whole or not at all."""
        with TensorWriter(self._file(key), {name: TensorInfo.of(part) for name, part in tensors.items()}) as writer:
            for name, part in tensors.items():
                writer.write(name, part)
            writer.metadata["record"] = json.dumps(record)
            writer.metadata["checksum"] = _checksum(tensors, record)

    def clear(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"
