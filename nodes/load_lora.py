"""Node: SVDQuant Load LoRA."""

import logging
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.utils
import folder_paths

from ..quantize.lora.names import renamed

log = logging.getLogger("svdquant")
FOLDER = "loras"


class SVDQuantLoadLora:
    DESCRIPTION = (
        "ComfyUI's own LoRA loader, which also reads spellings that ComfyUI does not know: XLabs, base_model.model.*, "
        "pipe.dit.*, transformer.* for Z-Image, old Diffusers files. For 4-bit and 16-bit models."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP")
    OUTPUT_TOOLTIPS = ("The model with the LoRA.", "The CLIP with the LoRA, where one is connected.")
    SEARCH_ALIASES = ("lora loader", "load lora")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A 4-bit or a 16-bit model."}),
                "lora_name": (folder_paths.get_filename_list(FOLDER), {"tooltip": "A LoRA in models/loras."}),
                "strength_model": ("FLOAT", {**strength, "tooltip": "How much of it, for the model."}),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "The text encoder, for LoRAs that have keys for it."}),
                "strength_clip": ("FLOAT", {**strength, "tooltip": "How much of it, for the CLIP."}),
            },
        }

    def load(
        self, model: Any, lora_name: str, strength_model: float, clip: Any = None, strength_clip: float = 1.0
    ) -> tuple[Any, Any]:
        if strength_model == 0 and (clip is None or strength_clip == 0):
            return model, clip
        path = folder_paths.get_full_path_or_raise(FOLDER, lora_name)
        lora = with_host_names(comfy.utils.load_torch_file(path, safe_load=True), model, clip)
        return comfy.sd.load_lora_for_models(model, clip, lora, strength_model, strength_clip)


def with_host_names(lora: dict[str, Any], model: Any, clip: Any = None) -> dict[str, Any]:
    """A LoRA's tensors under names that the host knows of this model, as far as there are any."""
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        known = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, known)
    lora = comfy.lora_convert.convert_lora(lora)  # first: it tells some files by names that are changed below
    names = renamed(lora, known)
    if names:
        old, new = next(iter(names.items()))
        log.info("%d keys of the LoRA are spelled otherwise in ComfyUI, as %s, which is %s there", len(names), old, new)
    return {names.get(key, key): tensor for key, tensor in lora.items()}
