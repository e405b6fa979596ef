"""Node: SVDQuant LoRA Limits."""

from typing import Any

from ..kernels.layer import RANK_TILE
from ..quantize.lora.fit import LoraLimits
from .host.patcher import BAKE, REFUSE


class SVDQuantLoraLimits:
    DESCRIPTION = (
        "How far a patch without an exact form on a 4-bit layer (full weight changes, OFT) may be approximated before "
        "it is refused. Plain LoRA, LoCon, LoHa, LoKr and DoRA are exact and not affected."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "limit"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model with the limits set.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        usual = LoraLimits()
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A 4-bit model."}),
                "max_rank": (
                    "INT",
                    {
                        "default": usual.max_rank,
                        "min": RANK_TILE,
                        "max": 4096,
                        "step": RANK_TILE,
                        "tooltip": "Columns that one patch may take in one layer.",
                    },
                ),
                "max_lost": (
                    "FLOAT",
                    {
                        "default": usual.max_lost,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Share of a patch's energy that may be lost in a layer; above it the patch is "
                        "refused. 1 refuses nothing.",
                    },
                ),
            },
            "optional": {
                "when_saved": (
                    [BAKE, REFUSE],
                    {
                        "default": BAKE,
                        "tooltip": "What ComfyUI's save nodes do with LoRAs on this model. bake: the file has them "
                        "inside, its low-rank branches grow by their columns. refuse: saving stops and says so.",
                    },
                ),
            },
        }

    def limit(self, model: Any, max_rank: int, max_lost: float, when_saved: str = BAKE) -> tuple[Any]:
        if not hasattr(model, "set_lora_limits"):
            raise ValueError("the model is not 4-bit: it has no limits")
        limited = model.clone()
        limited.set_lora_limits(LoraLimits(max_rank, max_lost))
        limited.set_when_saved(when_saved)
        return (limited,)
