"""Bridge: a loaded 16-bit MODEL as what the quantizer reads weights from."""

from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.model_detection
import torch
from comfy.model_patcher import ModelPatcher

from ...quantize.families import FAMILIES
from ...quantize.files.tensor_file import TensorInfo
from ...quantize.model_config import ConfigError, Extent, check_config
from .patcher import PREFIX, SVDQuantPatcher


class ModelSource:
    """The weights of a loaded MODEL, LoRAs and merges included, as a quantize.Source.

    raises  ValueError if the model is 4-bit already, or configured in a way that no file may state
    """

    family: str | None = None  # found from the keys

    def __init__(self, patcher: ModelPatcher) -> None:
        if isinstance(patcher, SVDQuantPatcher):
            raise ValueError("the model is 4-bit already; connect the 16-bit model that it was made from")
        self.name = f"the {type(patcher.model).__name__} model"
        self._patcher = patcher
        self._tensors = patcher.model.diffusion_model.state_dict()
        self.infos: Mapping[str, TensorInfo] = {name: TensorInfo.of(tensor) for name, tensor in self._tensors.items()}
        config = dict(patcher.model.model_config.unet_config)
        self.unet_config: Mapping[str, Any] = {key: value for key, value in config.items() if _is_plain(value)}
        stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in self._tensors.items()}
        detected = comfy.model_detection.detect_unet_config(stand_ins, "") or {}
        config = self.unet_config
        # what the class adds by itself is not pinned: another ComfyUI may want other values there
        own = patcher.model.model_config.unet_extra_config
        self.pinned: tuple[str, ...] = tuple(
            key for key in config if key not in own and not (key in detected and _same(detected[key], config[key]))
        )
        shapes = [info.shape for info in self.infos.values()]
        more = {key: kind for family in FAMILIES.values() for key, kind in family.config.items()}
        try:  # what is refused when the file is loaded is not written
            check_config({key: config[key] for key in self.pinned}, Extent(self.infos, shapes), more)
        except ConfigError as error:
            raise ValueError(f"{self.name} cannot be quantized: {error}") from error

    def tensor(self, key: str) -> torch.Tensor:
        """The weight as sampling would see it."""
        full, tensor = f"{PREFIX}{key}", self._tensors[key]
        if full in self._patcher.backup:  # patched in place at the moment: start from the original
            tensor = self._patcher.backup[full].weight
        if full not in self._patcher.patches:
            return tensor
        return comfy.lora.calculate_weight(self._patcher.patches[full], tensor.float().clone(), full).to(tensor.dtype)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return list(left) == list(right)
    return left == right
