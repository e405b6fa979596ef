"""Where 16-bit weights come from: a file here, a loaded model in a host. Both look like a Source."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ...kernels.bounded_json import JsonError, read_object
from ..families import detect
from .diffusers import host_names, refuse_foreign
from .encodings import decoded
from .sources import open_source
from .tensor_file import PREFIXES, TensorFile, TensorInfo
from .tensors import renamed

Known = Callable[[TensorFile], bool]
"""Whether somebody knows a model of these tensors, e.g. the host; asked where no family's table does"""


class Source(Protocol):
    """16-bit weights under ComfyUI's names.

    name         for messages
    infos        tensor name -> TensorInfo
    family       family name, or None to find it from the keys
    unet_config  ComfyUI's model configuration where it is known
    pinned       keys of unet_config that a host cannot find from the tensors
    """

    @property
    def name(self) -> str: ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    @property
    def family(self) -> str | None: ...

    @property
    def unet_config(self) -> Mapping[str, Any]: ...

    @property
    def pinned(self) -> tuple[str, ...]: ...

    def tensor(self, key: str) -> torch.Tensor: ...


class FileSource:
    """A 16-bit model in a file or a folder. A `config` entry in its metadata (JSON) is kept and pinned.

    Whatever a kind of `sources/` opens: one file or several, of safetensors, torch or GGUF, alone or in a checkpoint
    with other models. Weights in fewer bits (`encodings/`) appear decoded, Diffusers' names (`diffusers/`) as
    ComfyUI's. The same tensors give the same source, in the order of their names, whatever they came in.

    known   asked before the names of another program are refused
    raises  TensorFileError for a damaged file, a missing shard, or one that is 4-bit already; FamilyError for a model
            of several families, of one that ComfyUI has no class for, or of names that no ComfyUI reads

        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> fp8, scale = torch.full((128, 128), 3.0).to(torch.float8_e4m3fn), torch.tensor(0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/fp8.safetensors"
        ...     save_file({"blocks.0.proj.weight": fp8, "blocks.0.proj.scale_weight": scale}, path)
        ...     source = FileSource(path)
        ...     source.family, list(source.infos), source.tensor("blocks.0.proj.weight")[0, :2]
        ('generic', ['blocks.0.proj.weight'], tensor([1.5000, 1.5000], dtype=torch.bfloat16))
    """

    def __init__(self, path: str | Path, known: Known = lambda file: False) -> None:
        opened = open_source(path)
        self.name = Path(path).name
        file = host_names(decoded(_diffusion_model(opened)))
        if not known(file):
            refuse_foreign(file)
        family = detect(file)
        self.family = family.name
        canonical = {family.canonical(key): key for key in file}  # older names of the same layers
        self._file = renamed(file, {key: canonical[key] for key in sorted(canonical)})
        self.infos = self._file.infos
        self.unet_config = model_config(opened)
        self.pinned = tuple(self.unet_config)

    def tensor(self, key: str) -> torch.Tensor:
        return self._file.read(key)


def _diffusion_model(file: TensorFile) -> TensorFile:
    """Of a checkpoint of several models this one, under its own names."""
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in file)), "")
    return renamed(file, {key.removeprefix(prefix): key for key in file if key.startswith(prefix)})


def model_config(file: TensorFile) -> dict[str, Any]:
    """ComfyUI's model configuration from a file's metadata, {} where it has none. Not every `config` is one."""
    try:
        config = read_object(file.metadata.get("config", "{}"), f"{file.path.name}: config in the header")
    except JsonError:
        return {}
    return {} if "_class_name" in config else config
