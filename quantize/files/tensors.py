"""Tensors that are made when they are read, of a file or of several, under whatever names."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .tensor_file import TensorFile, TensorFileError, TensorInfo


class TensorView(TensorFile):
    """What looks like one safetensors file to all that read it.

    infos     name -> what `source` gives for it
    source    name -> the tensor
    metadata  strings, as a safetensors header has them

        >>> view = TensorView("a.ckpt", {"a": TensorInfo((3,), torch.int64)}, lambda name: torch.arange(3))
        >>> list(view), view.read("a")
        (['a'], tensor([0, 1, 2]))
    """

    def __init__(
        self,
        path: str | Path,
        infos: Mapping[str, TensorInfo],
        source: Callable[[str], torch.Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.infos = dict(infos)
        self.metadata = dict(metadata or {})
        self.problems = []
        self._source = source

    @property
    def has_checksums(self) -> bool:
        return False

    def read(self, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        return self._source(name)


def renamed(file: TensorFile, names: Mapping[str, str]) -> TensorFile:
    """Some of a file's tensors under other names: {new name: name in the file}."""
    infos = {name: file.infos[old] for name, old in names.items()}
    return TensorView(file.path, infos, lambda name: file.read(names[name]), file.metadata)


def together(path: Path, files: Sequence[TensorFile]) -> TensorFile:
    """Several files as one. Raises TensorFileError for a tensor that is in two of them."""
    if len(files) == 1:
        return renamed(files[0], {name: name for name in files[0]})
    owners: dict[str, TensorFile] = {}
    for file in files:
        for name in file:
            if name in owners:
                raise TensorFileError(
                    f"{path.name}: {name} is in {owners[name].path.name} and in {file.path.name}. They are not parts "
                    "of one model: give the one file"
                )
            owners[name] = file
    infos = {name: file.infos[name] for name, file in owners.items()}
    metadata = {key: text for file in reversed(files) for key, text in file.metadata.items()}
    return TensorView(path, infos, lambda name: owners[name].read(name), metadata)
