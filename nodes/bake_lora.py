"""Node: SVDQuant Bake LoRA."""

from typing import Any

import comfy.model_management
import comfy.utils

from .host.bake import bake
from .host.changed import WRITTEN, changed, fingerprint_of_statistics, target_of
from .host.files import NO_FILE, keep_source, open_statistics, refuse_name, statistics_files, target
from .host.model import load_model
from .host.patcher import SVDQuantPatcher


class SVDQuantBakeLora:
    DESCRIPTION = (
        "Writes a 4-bit checkpoint that has the MODEL's active LoRAs inside. The 4-bit weights stay as they are: the "
        "low-rank branch takes the LoRAs in."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "bake"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("MODEL", "file_name")
    OUTPUT_TOOLTIPS = ("The written model.", "Name of the written file in models/diffusion_models.")
    OUTPUT_NODE = True
    SEARCH_ALIASES = ("merge lora", "save lora into model", "4bit")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A 4-bit model with LoRAs."}),
                "file_name": (
                    "STRING",
                    {"default": "svdquant_with_lora", "tooltip": "Name in models/diffusion_models."},
                ),
                "refit": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Off: the branch grows by the LoRAs' columns, nothing is lost. On: every layer "
                        "keeps its rank, so the file keeps its size; the report says what is lost.",
                    },
                ),
            },
            "optional": {
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a file of that name."}),
                "statistics_file": (
                    [NO_FILE, *statistics_files()],
                    {
                        "default": NO_FILE,
                        "tooltip": "With refit: what SVDQuant Calibrate gathered, so that the error on the model's own "
                        "activations is the least.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, file_name: str | None = None) -> bool | str:
        return refuse_name(file_name) or True

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        reads = fingerprint_of_statistics(inputs.get("statistics_file"))
        return changed([reads], target_of(inputs["file_name"]), inputs)

    def bake(
        self, model: Any, file_name: str, refit: bool, overwrite: bool = False, statistics_file: str = NO_FILE
    ) -> dict[str, Any]:
        if not isinstance(model, SVDQuantPatcher):
            raise ValueError("the model is not 4-bit; SVDQuant Quantize Model bakes the LoRAs of a 16-bit MODEL in")
        path = target(file_name, overwrite)
        keep_source(path, model.model.svdquant.path)
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int, layer: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        with WRITTEN.writing(path):
            report = bake(model, path, refit, progress, open_statistics(statistics_file))
        text = (
            f"{path.name}: {report.layers} layers have the LoRAs inside, {report.lost:.3%} of their energy lost at most"
        )
        if report.dense:
            text += f"; {len(report.dense)} layers without a low-rank branch are stored in 16 bit"
        return {"ui": {"text": [text]}, "result": (load_model(str(path)), path.name)}
