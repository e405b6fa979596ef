"""Nodes for the demo: a tiny FLUX model that paints digits. Its prompts and decoder stand in for CLIP, T5 and VAE."""

from pathlib import Path
from typing import Any

import folder_paths
import torch

from ..quantize.files.tensor_file import TensorFile
from .host.files import FOLDER, find_or_raise, modified
from .host.model import load_pinned_model

CATEGORY = "SVDQuant/demo"
PROMPTS = Path(__file__).parents[1] / "workflows" / "models" / "svdquant_demo_prompts.safetensors"
PATCH = 4  # a latent channel holds one pixel of a 4 x 4 patch


class SVDQuantDemoModel:
    DESCRIPTION = "Loads the 16-bit demo model, whose size ComfyUI cannot find from its tensors alone."
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The 16-bit demo model.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = folder_paths.get_filename_list(FOLDER)
        tooltip = "A 16-bit file with its model configuration in the metadata, such as svdquant_demo_digits."
        return {"required": {"model_name": (names, {"tooltip": tooltip})}}

    @classmethod
    def IS_CHANGED(cls, model_name: str) -> float:
        return modified(model_name)

    def load(self, model_name: str) -> tuple[Any]:
        return (load_pinned_model(str(find_or_raise(model_name))),)


class SVDQuantDemoPrompt:
    DESCRIPTION = "A prompt for the demo model: image i of a batch shows digit i of the text, over and over."
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("The prompt for a sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"digits": ("STRING", {"default": "0123456789", "tooltip": "Which digits to paint."})}}

    @classmethod
    def VALIDATE_INPUTS(cls, digits: str | None = None) -> bool | str:
        if digits is None:  # it comes from another node, which has not run yet
            return True
        return (digits.isascii() and digits.isdigit()) or f"digits is {digits!r}, needed one or more of 0123456789"

    def encode(self, digits: str) -> tuple[Any]:
        rows = [int(digit) for digit in digits]
        prompts = TensorFile(PROMPTS)
        context, pooled = (prompts.read(name)[rows].float() for name in ("context", "pooled"))
        return ([[context, {"pooled_output": pooled}]],)


class SVDQuantDemoDecode:
    DESCRIPTION = "Turns latents of the demo model into 32 x 32 pictures."
    CATEGORY = CATEGORY
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The pictures.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT", {"tooltip": "Latents of the demo model."})}}

    def decode(self, samples: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        return (DemoVae.decode(samples["samples"]),)


class DemoVae:
    """The decoder as stock nodes want it: what a VAE's `decode` is."""

    @staticmethod
    def decode(samples: torch.Tensor) -> torch.Tensor:
        """(B, 16, H, W) -> (B, 4 H, 4 W, 3) in 0..1"""
        latent = (samples - 0.1159) * 0.3611  # undo ComfyUI's scaling of FLUX latents
        pixels = torch.nn.functional.pixel_shuffle(latent.float(), PATCH) / 2 + 0.5
        return pixels.clamp(0, 1).movedim(1, -1).repeat(1, 1, 1, 3)


class SVDQuantDemoVae:
    DESCRIPTION = "Stands in for the VAE of the demo model: decodes, but does not encode."
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("VAE",)
    OUTPUT_TOOLTIPS = ("For VAE Decode and SVDQuant Compare.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> tuple[DemoVae]:
        return (DemoVae(),)
