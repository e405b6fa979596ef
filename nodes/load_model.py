"""Node: SVDQuant Load Model."""

from typing import Any

import folder_paths

from ..quantize.checkpoint import CheckpointError, open_checkpoint
from .comfy_model import load_model

FOLDER = "diffusion_models"
COMPUTES = ["auto", "w4a4", "w16"]


class SVDQuantLoadModel:
    DESCRIPTION = (
        "Loads a 4-bit SVDQuant checkpoint into ComfyUI's own model. Use the MODEL like any other: LoRA loaders, "
        "ControlNet, samplers and model patches work unchanged."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The 4-bit model.",)
    SEARCH_ALIASES = ("4bit", "int4", "nvfp4", "nunchaku", "load diffusion model")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model_name": (
                    folder_paths.get_filename_list(FOLDER),
                    {"tooltip": "A 4-bit checkpoint in models/diffusion_models."},
                ),
                "compute": (
                    COMPUTES,
                    {
                        "default": "auto",
                        "tooltip": "How the 4-bit layers compute. auto: the best mode of this device. w4a4: 4-bit "
                        "weights and activations. w16: 4-bit weights, activations untouched (exact, slower).",
                    },
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str) -> bool | str:
        path = folder_paths.get_full_path(FOLDER, model_name)
        if path is None:
            return f"{model_name} is not in models/{FOLDER}; put it there and refresh the node list (R)"
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, model_name: str, compute: str) -> float:
        return modified(model_name)

    def load(self, model_name: str, compute: str) -> tuple[Any]:
        return (load_model(folder_paths.get_full_path_or_raise(FOLDER, model_name), compute),)


def modified(model_name: str) -> float:
    """When a model file was last written; 0 if it is gone, so that the node runs and says so."""
    from pathlib import Path

    path = folder_paths.get_full_path(FOLDER, model_name)
    return Path(path).stat().st_mtime if path else 0.0
