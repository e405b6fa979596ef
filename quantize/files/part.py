"""The diffusion model inside a file that holds more, and the strings that a save node of ComfyUI cannot write.

In a whole checkpoint the names of the diffusion model have a prefix, VAE and text encoders have others. ComfyUI's save
nodes write tensors and no header of ours, so a loaded 4-bit model hands them one tensor more, and readers take the
strings from it that the header lacks:

    <prefix>svdquant_header  uint8  UTF-8 JSON {key: string}: what stands in the header of a native file

Files that the pack writes itself have a header and never this tensor.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...kernels.bounded_json import JsonError, read_object
from .tensor_file import PREFIXES, TensorFile, TensorFileError, TensorInfo, open_tensors

HEADER = "svdquant_header"
PREFIX = PREFIXES[0]  # of the diffusion model in a whole checkpoint that the pack writes
LARGEST = 1 << 24  # bytes of that tensor: a name and a format for each layer


class ModelPart(TensorFile):
    """The tensors of `file` whose names have the prefix, without it; everything else is as if it were not there.

    others  names of those other tensors
    raises  TensorFileError for strings that are none
    """

    def __init__(self, file: TensorFile, prefix: str) -> None:
        self.path, self.problems = file.path, file.problems
        self._file, self._prefix = file, prefix
        names = [key for key in file if key.startswith(prefix)]
        self.infos = {key.removeprefix(prefix): file.infos[key] for key in names}
        self.others = tuple(key for key in file if not key.startswith(prefix))
        self.metadata = dict(file.metadata)
        if self.infos.pop(HEADER, None) is not None:
            self.metadata = {**_strings(file, f"{prefix}{HEADER}"), **self.metadata}

    @property
    def has_checksums(self) -> bool:
        return self._file.has_checksums

    def read(self, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        if name not in self.infos:
            raise KeyError(name)
        return self._file.read(f"{self._prefix}{name}", buffer)

    def read_other(self, name: str) -> torch.Tensor:
        """One of `others`."""
        return self._file.read(name)


@dataclass(frozen=True)
class Beside:
    """What goes into a whole checkpoint with the diffusion model: VAE and text encoders, under their own names."""

    infos: Mapping[str, TensorInfo]
    read: Callable[[str], torch.Tensor]

    @classmethod
    def of_file(cls, path: str | Path) -> "Beside":
        """Everything in a 16-bit checkpoint but its diffusion model. Raises TensorFileError where that is nothing."""
        file = open_tensors(path)
        part = model_part(file)
        if not part.others:
            raise TensorFileError(f"{file.path.name}: holds a diffusion model alone, no VAE and no text encoder")
        return cls({name: file.infos[name] for name in part.others}, part.read_other)


def model_part(file: TensorFile) -> ModelPart:
    """The diffusion model in `file`: what has the prefix of one, or all of it where nothing has.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tensors = {"model.diffusion_model.head.weight": torch.zeros(2, 2), "vae.conv.weight": torch.ones(1)}
    ...     save_file(tensors, f"{folder}/whole.safetensors")
    ...     part = model_part(TensorFile(f"{folder}/whole.safetensors"))
    ...     list(part), part.others, part.read("head.weight").shape
    (['head.weight'], ('vae.conv.weight',), torch.Size([2, 2]))
    """
    stated = [key.removesuffix(HEADER) for key in file if key.endswith(HEADER)]
    found = stated or [prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in file)]
    return ModelPart(file, found[0] if found else "")


def header_tensor(strings: Mapping[str, str]) -> torch.Tensor:
    """The tensor for these strings. Inverse: reading them as `ModelPart.metadata`."""
    return torch.frombuffer(bytearray(json.dumps(dict(strings)).encode()), dtype=torch.uint8)


def _strings(file: TensorFile, name: str) -> dict[str, str]:
    where = f"{file.path.name}: {name}"
    if file.infos[name].nbytes > LARGEST:
        raise TensorFileError(f"{where} has {file.infos[name].nbytes:,} bytes, at most {LARGEST:,} are read")
    try:
        strings = read_object(bytes(file.read(name).flatten().view(torch.uint8).numpy()), where)
    except JsonError as error:
        raise TensorFileError(str(error)) from error
    if not all(isinstance(text, str) for text in strings.values()):
        raise TensorFileError(f"{where} holds more than strings: the file is damaged or was edited")
    return strings
