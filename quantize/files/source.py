"""Where 16-bit weights come from: a file here, a loaded model in a host. Both look like a Source."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ...kernels.bounded_json import JsonError, read_object
from ..families import detect
from .dialects import speaking
from .tensor_file import PREFIXES, TensorFile, TensorFileError, TensorInfo

SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("scale_weight", "weight_scale")  # beside an fp8 `weight`: it means weight * scale
FP8_ONLY = (*SCALES, "scale_input", "input_scale", "comfy_quant")  # what else belongs to such a layer
FP8_MARKER = "scaled_fp8"  # an empty tensor in ComfyUI's scaled files


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
    """A `.safetensors` model in 16 bit or fp8. A `config` entry in its metadata (JSON) is kept and pinned.

    One file, or one of several shards `X-00001-of-0000N.safetensors`, which are then all read. fp8 weights appear as
    bf16, multiplied by the scale that lies beside them.

    raises  TensorFileError for a damaged file, a missing shard, or one that is 4-bit already; FamilyError for a model
            of several families or of one that ComfyUI has no class for

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

    def __init__(self, path: str | Path) -> None:
        files = [TensorFile(file) for file in shards(Path(path))]
        self.name = Path(path).name
        for file in files:
            self._refuse_4bit(file)
        self._files = {key: file for file in files for key in file}
        prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in self._files)), "")
        keys = {key.removeprefix(prefix): key for key in self._files if key.startswith(prefix)}
        family = detect(keys)
        self.family = family.name
        self._keys = {family.canonical(key): full for key, full in keys.items()}  # older names of the same layers
        stored = {key: self._files[full].infos[full] for key, full in self._keys.items()}
        self._scales = {key: scale for key in stored if (scale := _scale_of(key, stored)) is not None}
        for key, scale in self._scales.items():
            self._check_scale(key, stored[key].shape, stored[scale])
        dropped = {f"{key.removesuffix('weight')}{suffix}" for key in self._scales for suffix in FP8_ONLY} | {
            FP8_MARKER
        }
        self.infos = {
            key: TensorInfo(info.shape, torch.bfloat16) if info.dtype in FP8 else info
            for key, info in stored.items()
            if key not in dropped
        }
        self.unet_config = next((config for file in files if (config := model_config(file))), {})
        self.pinned = tuple(self.unet_config)

    def _refuse_4bit(self, file: TensorFile) -> None:
        if any(key.endswith(".weight") and info.dtype in FP8 for key, info in file.infos.items()):
            return  # such files may carry the markers of a 4-bit dialect
        for dialect in speaking(file):
            raise TensorFileError(f"{self.name}: is a 4-bit model already ({dialect.name}), needed a 16-bit one")

    def _check_scale(self, key: str, shape: tuple[int, ...], scale: TensorInfo) -> None:
        count = math.prod(scale.shape)
        if count not in (1, *shape[:1]) or not scale.dtype.is_floating_point:
            raise TensorFileError(
                f"{self.name}: the scale of {key} has shape {scale.shape} and dtype "
                f"{str(scale.dtype).removeprefix('torch.')}, needed one number, or one for each row of {shape}"
            )

    def tensor(self, key: str) -> torch.Tensor:
        tensor = self._read(key)
        if tensor.dtype not in FP8:
            return tensor
        wide = tensor.float()
        if key in self._scales:
            wide *= _as_column(self._read(self._scales[key]).float())
        return wide.to(torch.bfloat16)

    def _read(self, key: str) -> torch.Tensor:
        full = self._keys[key]
        return self._files[full].read(full)


def _scale_of(key: str, stored: Mapping[str, TensorInfo]) -> str | None:
    if not key.endswith(".weight") or stored[key].dtype not in FP8:
        return None
    return next((name for suffix in SCALES if (name := f"{key.removesuffix('weight')}{suffix}") in stored), None)


def _as_column(scale: torch.Tensor) -> torch.Tensor:
    """One scale for all, or one per row."""
    return scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())


def shards(path: Path) -> list[Path]:
    """All files of the model that `path` is one of. Raises TensorFileError that names the first missing one."""
    match = SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    base, count = match.groups()
    found = [path.with_name(f"{base}-{i:05d}-of-{count}.safetensors") for i in range(1, int(count) + 1)]
    for file in found:
        if not file.is_file():
            raise TensorFileError(f"{path.name}: is one of {int(count)} files, and {file.name} is not beside it")
    return found


def model_config(file: TensorFile) -> dict[str, Any]:
    """ComfyUI's model configuration from a file's metadata, {} where it has none. Not every `config` is one."""
    try:
        config = read_object(file.metadata.get("config", "{}"), f"{file.path.name}: config in the header")
    except JsonError:
        return {}
    return {} if "_class_name" in config else config
