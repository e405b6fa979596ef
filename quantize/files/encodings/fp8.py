"""fp8 weights: bf16(weight * scale), the scale one number or one for each row, where there is one.

Spelled `X.scale_weight` with an empty `scaled_fp8` beside (ComfyUI), or `X.weight_scale` with `X.comfy_quant`, or
without a scale.
"""

import math

import torch

from ..tensor_file import TensorFile, TensorFileError, TensorInfo
from ..tensors import TensorView

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("scale_weight", "weight_scale")  # beside an fp8 `weight`: it means weight * scale
FP8_ONLY = (*SCALES, "scale_input", "input_scale", "comfy_quant")  # what else belongs to such a layer
FP8_MARKER = "scaled_fp8"  # an empty tensor in ComfyUI's scaled files


def decode(file: TensorFile) -> TensorFile:
    """Raises TensorFileError for a scale that does not fit its weight."""
    if not any(info.dtype in FP8 for info in file.infos.values()):
        return file
    scales = {key: scale for key in file if (scale := _scale_of(key, file)) is not None}
    for key, scale in scales.items():
        _check_scale(file, key, file.infos[scale])
    dropped = {f"{key.removesuffix('weight')}{suffix}" for key in scales for suffix in FP8_ONLY} | {FP8_MARKER}

    def read(key: str) -> torch.Tensor:
        tensor = file.read(key)
        if tensor.dtype not in FP8:
            return tensor
        wide = tensor.float()
        if key in scales:
            wide *= _as_column(file.read(scales[key]).float())
        return wide.to(torch.bfloat16)

    infos = {
        key: TensorInfo(info.shape, torch.bfloat16) if info.dtype in FP8 else info
        for key, info in file.infos.items()
        if key not in dropped
    }
    return TensorView(file.path, infos, read, file.metadata)


def _scale_of(key: str, file: TensorFile) -> str | None:
    if not key.endswith(".weight") or file.infos[key].dtype not in FP8:
        return None
    return next((name for suffix in SCALES if (name := f"{key.removesuffix('weight')}{suffix}") in file), None)


def _check_scale(file: TensorFile, key: str, scale: TensorInfo) -> None:
    shape = file.infos[key].shape
    if math.prod(scale.shape) not in (1, *shape[:1]) or not scale.dtype.is_floating_point:
        raise TensorFileError(
            f"{file.path.name}: the scale of {key} has shape {scale.shape} and dtype "
            f"{str(scale.dtype).removeprefix('torch.')}, needed one number, or one for each row of {shape}"
        )


def _as_column(scale: torch.Tensor) -> torch.Tensor:
    """One scale for all, or one per row."""
    return scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
