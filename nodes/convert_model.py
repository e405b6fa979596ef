"""Node: SVDQuant Convert Model."""

from typing import Any

import comfy.model_management
import comfy.utils

from ..quantize.files.convert import TARGETS, convert_file
from .host.changed import WRITTEN, changed, fingerprint_of_model, target_of
from .host.files import choices, find_or_raise, refuse_name, target


class SVDQuantConvertModel:
    DESCRIPTION = (
        "Writes a 4-bit checkpoint in another spelling: native (this pack and ComfyUI's own quantizer), nunchaku, or "
        "kitchen (comfy-kitchen's tensor names). The numbers stay the same; what a spelling cannot hold is refused."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "convert"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("file_name",)
    OUTPUT_TOOLTIPS = ("Name of the written file in models/diffusion_models.",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model_name": (choices(), {"tooltip": "A 4-bit checkpoint of any spelling."}),
                "to": (list(TARGETS), {"tooltip": "The spelling to write."}),
                "file_name": (
                    "STRING",
                    {"default": "my_model_native", "tooltip": "Written to models/diffusion_models."},
                ),
            },
            "optional": {
                "as_is": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Keep layer names, each layer on its own. For unknown models."},
                ),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a file of this name."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, file_name: str | None = None) -> bool | str:
        return refuse_name(file_name) or True

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        return changed([fingerprint_of_model(inputs["model_name"])], target_of(inputs["file_name"]), inputs)

    def convert(
        self, model_name: str, to: str, file_name: str, as_is: bool = False, overwrite: bool = False
    ) -> dict[str, Any]:
        path = target(file_name, overwrite)
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int, layer: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        with WRITTEN.writing(path):
            report = convert_file(find_or_raise(model_name), path, to, as_is, progress)
        text = f"{path.name}: {report.layers} layers of family {report.family}, {report.source_dialect} -> {to}"
        return {"ui": {"text": ["\n".join((text, *report.notes))]}, "result": (path.name,)}
