"""Where 16-bit weights come from: a file here, a loaded model in a host. Both look like a Source."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from .dialects import DIALECTS
from .tensor_file import TensorFile, TensorFileError, TensorInfo

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # whole checkpoints, and some exports


class Source(Protocol):
    """16-bit weights under ComfyUI's names.

    name         for messages
    infos        tensor name -> TensorInfo
    family       family name, or None to find it from the keys
    unet_config  ComfyUI's model configuration where it is known
    pinned       keys of unet_config that a host cannot find from the tensors
    """

    name: str
    infos: Mapping[str, TensorInfo]
    family: str | None
    unet_config: Mapping[str, Any]
    pinned: tuple[str, ...]

    def tensor(self, key: str) -> torch.Tensor: ...


class FileSource:
    """A 16-bit `.safetensors` model. A `config` entry in its metadata (JSON) is kept and pinned.

    raises  TensorFileError for a damaged file or one that is 4-bit already
    """

    family = None

    def __init__(self, path: str | Path) -> None:
        self._file = TensorFile(path)
        self.name = self._file.path.name
        for dialect in DIALECTS.values():
            if dialect.speaks(self._file):
                raise TensorFileError(f"{self.name}: is a 4-bit model already ({dialect.name}), needed a 16-bit one")
        prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in self._file)), "")
        self._keys = {key.removeprefix(prefix): key for key in self._file if key.startswith(prefix)}
        self.infos = {key: self._file.infos[stored] for key, stored in self._keys.items()}
        self.unet_config = model_config(self._file)
        self.pinned = tuple(self.unet_config)

    def tensor(self, key: str) -> torch.Tensor:
        return self._file[self._keys[key]]


def model_config(file: TensorFile) -> dict[str, Any]:
    """ComfyUI's model configuration from a file's metadata, {} where it has none. Not every `config` is one."""
    try:
        config = json.loads(file.metadata.get("config", "{}"))
    except json.JSONDecodeError:
        return {}
    return config if isinstance(config, dict) and "_class_name" not in config else {}
