"""Node: SVDQuant Load Checkpoint."""

from typing import Any

from ..kernels import COMPUTES
from ..quantize.files.checkpoint import CheckpointError
from ..quantize.files.open import open_checkpoint
from .host.changed import fingerprint
from .host.files import CHECKPOINTS, choices, find_checkpoint, find_or_raise
from .host.guard import CHOICES, REFERENCE
from .host.whole import load_whole
from .load_model import COMPUTE_TOOLTIP, FINITE_TOOLTIP


class SVDQuantLoadCheckpoint:
    DESCRIPTION = (
        "Loads a whole 4-bit checkpoint: diffusion model, text encoders and VAE in one file, as ComfyUI's node Save "
        "Checkpoint or SVDQuant Quantize Model writes it."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = ("The 4-bit model.", "The file's text encoders.", "The file's VAE.")
    SEARCH_ALIASES = ("4bit", "load checkpoint", "all in one")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ckpt_name": (
                    choices(CHECKPOINTS),
                    {"tooltip": "A whole 4-bit checkpoint in models/checkpoints."},
                ),
                "compute": (list(COMPUTES), {"default": "auto", "tooltip": COMPUTE_TOOLTIP}),
            },
            "optional": {
                "if_not_finite": (
                    list(CHOICES),
                    {"default": REFERENCE, "tooltip": FINITE_TOOLTIP, "advanced": True},
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, ckpt_name: str, compute: str = "auto") -> bool | str:
        try:
            open_checkpoint(find_or_raise(ckpt_name, find_checkpoint, CHECKPOINTS)).check_compute(compute)
        except (CheckpointError, FileNotFoundError) as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, ckpt_name: str, **settings: str) -> str:
        return repr(fingerprint(find_checkpoint(ckpt_name)))

    def load(self, ckpt_name: str, compute: str, if_not_finite: str = REFERENCE) -> tuple[Any, Any, Any]:
        return load_whole(str(find_or_raise(ckpt_name, find_checkpoint, CHECKPOINTS)), compute, if_not_finite)
