"""Node: SVDQuant Quantize Model."""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths

from ..kernels.formats import DEFAULT
from ..kernels.layer import RANK_TILE
from ..quantize.calibration.file import Statistics
from ..quantize.files.source import FileSource
from ..quantize.maker.model import QuantizeReport, Target, quantize_model
from ..quantize.maker.report import summarize, write_report
from ..quantize.recipe import NAMED, WITH_BRANCH, Recipe, bytes_of
from .calibrate import STATISTICS
from .host.changed import WRITTEN, changed, fingerprint_of_source, fingerprint_of_statistics, target_of
from .host.files import (
    CHECKPOINTS,
    FOLDER,
    NO_FILE,
    find_or_raise,
    find_source,
    keep_source,
    open_statistics,
    refuse_name,
    source_choices,
    statistics_files,
    target,
)
from .host.model import load_model
from .host.openable import known_to_host, refuse_unopenable
from .host.source import ModelSource
from .host.whole import beside_of

MODEL_INPUT = "(model input)"
AUTO = "auto"


class SVDQuantQuantizeModel:
    DESCRIPTION = (
        "Makes a 4-bit checkpoint of a 16-bit model and returns the 4-bit model. Needs no data and no GPU; one layer "
        "is in memory at a time. With statistics from SVDQuant Calibrate the result is much better. LoRAs and merges "
        "of a connected MODEL are baked in. Writes a report to output/svdquant."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "quantize"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("MODEL", "file_name")
    OUTPUT_TOOLTIPS = ("The 4-bit model.", "Name of the written file.")
    OUTPUT_NODE = True
    SEARCH_ALIASES = ("4bit", "int4", "nvfp4", "compress model")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "source": (
                    [MODEL_INPUT, *source_choices()],
                    {
                        "tooltip": "A 16-bit, fp8 or GGUF file, a Diffusers folder, or the connected MODEL. A file is "
                        "read layer by layer, never whole."
                    },
                ),
                "format": (
                    list(WITH_BRANCH),
                    {
                        "default": DEFAULT,
                        "tooltip": "int4 for NVIDIA RTX 20, 30 and 40; nvfp4 for RTX 50. Every device runs both.",
                    },
                ),
                "rank": (
                    "INT",
                    {
                        "default": 32,
                        "min": 0,
                        "max": 512,
                        "step": RANK_TILE,
                        "tooltip": "Width of the 16-bit low-rank branch. More is better and larger: 32 is usual.",
                    },
                ),
                "file_name": (
                    "STRING",
                    {"default": "my_model_svdquant_int4", "tooltip": "Written to models/diffusion_models."},
                ),
            },
            "optional": _OPTIONAL | {"statistics_file": ([NO_FILE, *statistics_files()], _STATISTICS_FILE)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, file_name: str | None = None) -> bool | str:
        return refuse_name(file_name) or True

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        reads = fingerprint_of_source(inputs["source"]), fingerprint_of_statistics(inputs.get("statistics_file"))
        kind = CHECKPOINTS if inputs.keys() & {"clip", "vae"} else FOLDER
        return changed(reads, target_of(inputs["file_name"], kind), inputs)

    def quantize(
        self,
        source: str,
        format: str,
        rank: int,
        file_name: str,
        model: Any = None,
        overwrite: bool = False,
        statistics: Any = None,
        after: Any = None,
        statistics_file: str = NO_FILE,
        recipe: str = AUTO,
        activation: str = "stock",
        auto_rank: bool = False,
        target_size_gb: float = 0.0,
        fallback: float = 0.0,
        resume: bool = True,
        act8_share: float = 0.1,
        clip: Any = None,
        vae: Any = None,
    ) -> dict[str, Any]:
        if source == MODEL_INPUT and model is None:
            raise ValueError(f"source is {MODEL_INPUT} and no MODEL is connected: connect one or choose a file")
        whole = clip is not None or vae is not None
        if whole and model is None:
            raise ValueError("a CLIP or VAE is connected and no MODEL, which knows their names in a checkpoint")
        path = target(file_name, overwrite, CHECKPOINTS if whole else FOLDER)
        file = None if source == MODEL_INPUT else find_or_raise(source, find_source)
        keep_source(path, file)
        weights = ModelSource(model) if file is None else FileSource(file, known_to_host)
        known = _statistics(statistics, statistics_file)
        name = recipe if recipe != AUTO else "fast" if known is None else "balanced"
        chosen = Recipe.named(
            name,
            format=format,
            rank=rank,
            activation=activation,
            auto_rank=auto_rank,
            target_size=bytes_of(target_size_gb),
            fallback=fallback,
            act8_share=act8_share,
        )
        if isinstance(weights, FileSource):
            refuse_unopenable(weights, chosen)
        device = comfy.model_management.get_torch_device()
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int, layer: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        goal = Target(path, resume, beside_of(model, clip, vae) if whole else None)
        with WRITTEN.writing(path):
            report = quantize_model(weights, goal, chosen, progress, str(device), known)
        folder = Path(folder_paths.get_output_directory()) / "svdquant" / f"{path.stem}.report"
        write_report(report, folder)
        return {"ui": {"text": [_text(report, folder)]}, "result": (load_model(str(path)), path.name)}


_STATISTICS_FILE = {"default": NO_FILE, "tooltip": "Statistics of an earlier run, when none are connected."}
_OPTIONAL: dict[str, Any] = {
    "model": (
        "MODEL",
        {
            "tooltip": "The 16-bit model, when source is (model input). It is as its loader has read it: of a file "
            "that was replaced since, choose the name as source, or empty ComfyUI's cache.",
        },
    ),
    "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a file of this name."}),
    "statistics": (STATISTICS, {"tooltip": "From SVDQuant Calibrate. Without statistics the recipe is fast."}),
    "after": (
        "LATENT",
        {"tooltip": "The output of the sampler that the calibration watches, so that quantizing waits for it."},
    ),
    "recipe": (
        [AUTO, *NAMED],
        {
            "default": AUTO,
            "tooltip": "auto: balanced with statistics, else fast. best takes about twice as long as balanced. "
            "svdquant: the reference method, for comparison.",
        },
    ),
    "activation": (
        ["stock", "best"],
        {
            "default": "stock",
            "tooltip": "best: finer activation rounding, for kernels that have it; others fall back to stock.",
        },
    ),
    "auto_rank": (
        "BOOLEAN",
        {"default": False, "tooltip": "Give each layer its own rank; together they take the bytes of `rank`."},
    ),
    "target_size_gb": (
        "FLOAT",
        {
            "default": 0.0,
            "min": 0.0,
            "max": 1000.0,
            "step": 0.001,
            "tooltip": "Choose ranks so that the file has this size. 0: no limit.",
        },
    ),
    "fallback": (
        "FLOAT",
        {
            "default": 0.0,
            "min": 0.0,
            "max": 1.0,
            "step": 0.01,
            "tooltip": "Layers with a relative output error above this, and the worst ones, get 8-bit activations; "
            "those still above it stay in 16 bit. 0: all are 4-bit; 0.25 is usual.",
        },
    ),
    "resume": ("BOOLEAN", {"default": True, "tooltip": "Take up a run that was stopped, layer by layer."}),
    "act8_share": (
        "FLOAT",
        {
            "default": 0.1,
            "min": 0.0,
            "max": 1.0,
            "step": 0.01,
            "tooltip": "With fallback: at most this share of the multiply-adds gets 8-bit activations. They take no "
            "bytes, and time where a GPU is faster with 4-bit ones.",
        },
    ),
    "clip": (
        "CLIP",
        {"tooltip": "Goes into the file as well, as it is. The file is then written to models/checkpoints."},
    ),
    "vae": ("VAE", {"tooltip": "The same."}),
}


def _statistics(connected: Any, file_name: str) -> Statistics | None:
    return open_statistics(file_name) if connected is None else Statistics.open(connected.path)


def _text(report: QuantizeReport, folder: Path) -> str:
    data = summarize(report)
    text = (
        f"{report.path.name}: {len(report.errors)} layers of family {report.family} are 4-bit, "
        f"{data['ratio'] or 0:.2f}x smaller, mean weight error {data['mean_weight_error'] or 0:.4f}"
    )
    if data["mean_output_error"] is not None:
        text += f", mean output error {data['mean_output_error']:.4f}"
    if report.eight:
        text += f", {len(report.eight)} layers have 8-bit activations"
    if report.kept:
        text += f", {len(report.kept)} layers stay in 16 bit"
    return "\n".join([f"{text}. Report: output/svdquant/{folder.name}", *report.notes])
