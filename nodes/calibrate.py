"""Node: SVDQuant Calibrate."""

import math
from typing import Any

from .host.files import refuse_statistics_name, statistics_target
from .host.watch import Collector

STATISTICS = "SVDQUANT_STATISTICS"
GB = 10**9


class SVDQuantCalibrate:
    DESCRIPTION = (
        "Watches a 16-bit MODEL while your own sampler runs it, and keeps what SVDQuant Quantize Model needs to know. "
        "Every run adds to the same file: a few different prompts make it better."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "calibrate"
    RETURN_TYPES = ("MODEL", STATISTICS)
    RETURN_NAMES = ("MODEL", "statistics")
    OUTPUT_TOOLTIPS = (
        "The same model; connect it to your sampler.",
        "For SVDQuant Quantize Model. Connect the sampler's LATENT there as well, so that it waits for the run.",
    )
    SEARCH_ALIASES = ("calibration", "statistics", "4bit")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The 16-bit model, LoRAs included."}),
                "file_name": (
                    "STRING",
                    {"default": "my_model", "tooltip": "Written to output/svdquant; can be shared and merged."},
                ),
                "tokens": (
                    "INT",
                    {
                        "default": 8192,
                        "min": 64,
                        "max": 65536,
                        "step": 64,
                        "tooltip": "Activations kept per layer. 2 to 10 per input channel are good.",
                    },
                ),
                "disk_gb": (
                    "FLOAT",
                    {
                        "default": 16.0,
                        "min": 0.01,
                        "max": 1000.0,
                        "step": 0.01,
                        "tooltip": "The file is at most this large; fewer tokens are kept if need be.",
                    },
                ),
                "start_over": ("BOOLEAN", {"default": False, "tooltip": "Forget what a file of this name holds."}),
            },
            "optional": {
                "sensitivity": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Also measure how much each layer matters, for a budget. Slow: at four steps of "
                        "each run the model is run once more per layer.",
                    },
                )
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, file_name: str | None = None) -> bool | str:
        return refuse_statistics_name(file_name) or True

    def calibrate(
        self, model: Any, file_name: str, tokens: int, disk_gb: float, start_over: bool, sensitivity: bool = False
    ) -> tuple[Any, Collector]:
        if not math.isfinite(disk_gb):  # the host's own bounds let NaN through
            raise ValueError(f"disk_gb is {disk_gb}, needed a number of gigabytes")
        path = statistics_target(file_name)
        collector = Collector.of(model, path, tokens, int(disk_gb * GB), not start_over, sensitivity)
        return collector.watch(model), collector
