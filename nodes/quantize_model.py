"""Node: SVDQuant Quantize Model."""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths

from ..quantize.build import quantize_model
from ..quantize.recipe import RANK_MULTIPLE, Recipe
from ..quantize.source import FileSource
from .comfy_model import ModelSource, load_model
from .load_model import FOLDER

MODEL_INPUT = "(model input)"


class SVDQuantQuantizeModel:
    DESCRIPTION = (
        "Makes a 4-bit checkpoint of a 16-bit model and returns the 4-bit model. Needs no data and no GPU; one layer "
        "is in memory at a time. LoRAs and merges of a connected MODEL are baked in."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "quantize"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("MODEL", "file_name")
    OUTPUT_TOOLTIPS = ("The 4-bit model.", "Name of the written file in models/diffusion_models.")
    OUTPUT_NODE = True
    SEARCH_ALIASES = ("4bit", "int4", "nvfp4", "compress model")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "source": (
                    [MODEL_INPUT, *folder_paths.get_filename_list(FOLDER)],
                    {"tooltip": "A 16-bit file, or the connected MODEL. A file is read layer by layer, never whole."},
                ),
                "format": (
                    ["int4", "nvfp4"],
                    {"tooltip": "int4 for NVIDIA RTX 20, 30 and 40; nvfp4 for RTX 50. Every device runs both."},
                ),
                "rank": (
                    "INT",
                    {
                        "default": 32,
                        "min": 0,
                        "max": 512,
                        "step": RANK_MULTIPLE,
                        "tooltip": "Width of the 16-bit low-rank branch. More is better and larger: 32 is usual.",
                    },
                ),
                "file_name": (
                    "STRING",
                    {"default": "my_model_svdquant_int4", "tooltip": "Written to models/diffusion_models."},
                ),
            },
            "optional": {
                "model": ("MODEL", {"tooltip": "The 16-bit model, when source is (model input)."}),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a file of this name."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, file_name: str) -> bool | str:
        name = Path(file_name)
        if not file_name.strip() or name.is_absolute() or ".." in name.parts:
            return f"file_name is {file_name!r}, needed a name inside models/{FOLDER}"
        return True

    def quantize(
        self, source: str, format: str, rank: int, file_name: str, model: Any = None, overwrite: bool = False
    ) -> dict[str, Any]:
        if source == MODEL_INPUT and model is None:
            raise ValueError(f"source is {MODEL_INPUT} and no MODEL is connected: connect one or choose a file")
        path = target_path(file_name)
        if path.exists() and not overwrite:
            raise ValueError(f"{path.name} exists already in {path.parent}: choose another name or turn overwrite on")
        weights = (
            ModelSource(model)
            if source == MODEL_INPUT
            else FileSource(folder_paths.get_full_path_or_raise(FOLDER, source))
        )
        device = comfy.model_management.get_torch_device()
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int, layer: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        report = quantize_model(weights, path, Recipe(format=format, rank=rank), progress, str(device))
        mean = sum(report.errors.values()) / len(report.errors)
        text = (
            f"{path.name}: {len(report.errors)} layers of family {report.family} are 4-bit, "
            f"{report.bytes_16bit / report.bytes_4bit:.2f}x smaller, mean weight error {mean:.4f}"
        )
        return {"ui": {"text": [text]}, "result": (load_model(str(path)), path.name)}


def target_path(file_name: str) -> Path:
    """models/diffusion_models/<file_name>.safetensors"""
    return model_folder() / (file_name if file_name.endswith(".safetensors") else f"{file_name}.safetensors")


def model_folder() -> Path:
    """Where new models go: of ComfyUI's folders for diffusion models the one of that name."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    return next((folder for folder in folders if folder.name == FOLDER), folders[0])
