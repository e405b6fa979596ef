"""Node: SVDQuant Load Model."""

from typing import Any

from ..quantize.checkpoint import CheckpointError, open_checkpoint
from .comfy_model import load_model
from .model_files import choices, find_or_raise, modified

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
                    choices(),
                    {"tooltip": "A 4-bit checkpoint in models/diffusion_models, of any published spelling."},
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
        try:
            open_checkpoint(find_or_raise(model_name))
        except (CheckpointError, FileNotFoundError) as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, model_name: str, compute: str) -> float:
        return modified(model_name)

    def load(self, model_name: str, compute: str) -> tuple[Any]:
        return (load_model(str(find_or_raise(model_name)), compute),)
