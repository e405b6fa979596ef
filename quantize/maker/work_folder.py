"""Finished layers of a run that may be stopped: what is taken up again when the same run is started a second time.

One `.safetensors` file per group of layers, named by a key over everything that decides its content: recipe, specs,
weights and statistics. A file of another recipe or another model is never found, so nothing has to be compared.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from ...kernels.bounded_json import JsonError, read_object
from ..files.integrity import bytes_of
from ..files.lifecycle import Owner, users, work_for
from ..files.tensor_file import TensorFile, TensorFileError, TensorInfo, TensorWriter


def digest(parts: Iterable[str | torch.Tensor]) -> str:
    """sha256 over texts and over names, shapes and bytes of tensors."""
    made = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            made.update(f"{len(part)}:{part}".encode())
        else:
            made.update(f"{part.dtype}{tuple(part.shape)}".encode())
            made.update(bytes_of(part))
    return made.hexdigest()


class WorkFolder:
    """The folder of one target file; made when the first layer is kept, gone when the run is finished.

        with WorkFolder.beside(target) as work:

    Inside `with` it names this process as its user. A run that is stopped leaves it, for the next one to take up.
    raises  OSError on entry while another process of this machine uses it
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark: IO[str] | None = None

    @classmethod
    def beside(cls, target: str | Path) -> "WorkFolder":
        return cls(work_for(Path(target)))

    def __enter__(self) -> "WorkFolder":
        if user := self._other_user():
            raise OSError(
                errno.EBUSY,
                f"process {user.pid} is writing the same file at the moment; wait for it, or choose another name",
                str(self.path),
            )
        if self.path.is_dir():
            self._use()
        return self

    def __exit__(self, *error: object) -> None:
        self._leave()

    def _other_user(self) -> Owner | None:
        this = Owner.this()
        return next((user for user in users(self.path) if user.is_here and user.lives and user != this), None)

    def _use(self) -> None:
        """Say so in the folder; marks of the dead are gone then."""
        self.path.mkdir(parents=True, exist_ok=True)
        for user in users(self.path):
            if not user.lives:
                (self.path / f"{user}.owner").unlink(missing_ok=True)
        if self._mark is None:  # held open: on Windows that keeps it from being removed
            self._mark = (self.path / f"{Owner.this()}.owner").open("w")

    def _leave(self) -> None:
        if self._mark is not None:
            self._mark.close()
            Path(self._mark.name).unlink(missing_ok=True)
            self._mark = None

    def find(self, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, record) kept under `key`; None where there is none, or it is not what was kept."""
        try:
            file = TensorFile(self._file(key))
            tensors = {name: file.read(name) for name in file}
            record = read_object(file.metadata.get("record", ""), "record")
        except (TensorFileError, JsonError):
            return None
        return (tensors, record) if file.has_checksums else None

    def keep(self, key: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Write whole or not at all."""
        self._use()
        with TensorWriter(self._file(key), {name: TensorInfo.of(part) for name, part in tensors.items()}) as writer:
            for name, part in tensors.items():
                writer.write(name, part)
            writer.metadata["record"] = json.dumps(record)

    def clear(self) -> None:
        """Nobody needs it any more, unless another process uses it."""
        self._leave()
        if self._other_user() is None:
            shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"
