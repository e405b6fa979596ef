"""Node: SVDQuant Load Model."""

from typing import Any

from ..kernels import COMPUTES
from ..quantize.files.checkpoint import CheckpointError
from ..quantize.files.open import open_checkpoint
from .host.changed import fingerprint_of_model
from .host.files import choices, find_or_raise
from .host.guard import CHOICES, REFERENCE
from .host.model import load_model

COMPUTE_TOOLTIP = """How the 4-bit layers compute. SVDQuant Model Info says what runs and what the device has not.
auto: the best mode of this device.
w4a4: 4-bit weights and activations, the layer as it was made.
w4a8: activations in 8 bit, closer to the 16-bit model; INT4 files only.
w8a8: both sides in 8 bit; the expanded weights are kept, which takes half of the 16-bit model's memory more.
w4a8-jit: the same numbers, the weights are expanded again for each call.
fp8: both sides in fp8, the weights are expanded for each call.
w16: activations are not rounded, the weights are expanded to 16 bit for each call: the most exact, and slow.
measured: the fastest kernels and modes by the clock of this device. What is not known yet is measured while the model \
loads, once for each size of layer, and kept in ~/.cache/svdquant/measured.json."""
FINITE_TOOLTIP = """What to do when a layer gives NaN or Inf although its input has none. Either way the layer is named.
reference: plain torch computes that layer, its kernel is turned off until ComfyUI restarts, and the run goes on.
stop: the run ends with an error."""


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
                    list(COMPUTES),
                    {"default": "auto", "tooltip": COMPUTE_TOOLTIP},
                ),
            },
            "optional": {
                "if_not_finite": (
                    list(CHOICES),
                    {"default": REFERENCE, "tooltip": FINITE_TOOLTIP, "advanced": True},
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str, compute: str = "auto") -> bool | str:
        try:
            open_checkpoint(find_or_raise(model_name)).check_compute(compute)
        except (CheckpointError, FileNotFoundError) as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, model_name: str, **settings: str) -> str:
        return repr(fingerprint_of_model(model_name))

    def load(self, model_name: str, compute: str, if_not_finite: str = REFERENCE) -> tuple[Any]:
        return (load_model(str(find_or_raise(model_name)), compute, if_not_finite),)
