"""The commands of the quantizer: quantize, merge, and inspect for statistics files."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from ...kernels.formats import DEFAULT
from ..calibration.file import Statistics
from ..calibration.several import describe, merge
from ..files.part import Beside
from ..files.source import FileSource
from ..maker.model import Target, quantize_model
from ..maker.report import summarize, write_report
from ..recipe import NAMED, OWN, SHARED, WITH_BRANCH, Recipe, bytes_of
from . import add_target, report_folder_of, show, target_of


def add_commands(commands: Any) -> None:
    """Add the parsers of this file's commands to those of `python -m quantize`."""
    command = commands.add_parser("quantize", help="make a 4-bit file of a 16-bit model")
    command.add_argument("source", metavar="IN", help="16-bit or fp8; of several shards any one")
    add_target(command)
    command.add_argument("--format", choices=WITH_BRANCH, default=DEFAULT)
    command.add_argument("--rank", default="32", help="width of the low-rank branch, a multiple of 16, or auto")
    command.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")
    command.add_argument("--recipe", choices=NAMED, help="default: balanced with statistics, else fast")
    command.add_argument("--statistics", metavar="FILE", help="what SVDQuant Calibrate has written for this model")
    command.add_argument(
        "--branches",
        choices=(OWN, SHARED),
        default=OWN,
        help="of layers of one input; own is more exact, shared is what Nunchaku and comfy-kitchen join",
    )
    command.add_argument("--activation", choices=("stock", "best"), default="stock", help="activation rounding")
    command.add_argument("--target-size", type=float, default=0, metavar="GB", help="choose ranks for this file size")
    command.add_argument(
        "--fallback", type=float, default=0, metavar="ERROR", help="more bits for layers above this output error"
    )
    command.add_argument(
        "--act8-share", type=float, default=0.1, metavar="SHARE", help="most multiply-adds with 8-bit activations"
    )
    command.add_argument("--resume", action="store_true", help="keep finished layers if stopped, and take them up")
    command.add_argument("--whole", action="store_true", help="keep the VAE and text encoders that IN has as well")
    command.add_argument("--seed", type=int, default=0, help="of the randomized SVD")
    command.add_argument("--report", metavar="FOLDER", help="write report.json, report.md and pictures there")
    command.set_defaults(run=_quantize)

    command = commands.add_parser("merge", help="join statistics of several runs of one model")
    add_target(command)
    command.add_argument("sources", metavar="IN", nargs="+")
    command.set_defaults(run=_merge)


def is_statistics(path: str) -> bool:
    """Whether a file is for `inspect_statistics`; damaged files are not."""
    from ..files.tensor_file import TensorFile, TensorFileError

    try:
        return Path(path).is_file() and "statistics" in TensorFile(path).metadata
    except TensorFileError:
        return False


def inspect_statistics(path: str) -> tuple[dict[str, Any], str]:
    """What a statistics file holds, as data and as text."""
    found = describe(path)
    layers = found["layers"]
    lines = [
        f"{found['file']}: statistics of {len(layers)} inputs, family {found['family']}, {len(found['runs'])} runs",
        f"size    {found['bytes']:,} bytes, room for more tokens included",
    ]
    if not found["finished"]:
        lines.append("a run is writing this file, or was stopped while it did: the next run goes on with it")
    lines += [
        f"{layer['tokens']:>7} tokens of {layer['seen']:>9}, {layer['hold_out']:>5} held out, absmax "
        f"{layer['absmax']:>9.3g}  {name}"
        for name, layer in layers.items()
    ]
    return found, "\n".join(lines)


def _quantize(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    start, target = time.perf_counter(), target_of(arguments, *filter(None, (arguments.source, arguments.statistics)))
    folder = report_folder_of(arguments)
    statistics = Statistics.open(arguments.statistics) if arguments.statistics else None
    auto = arguments.rank == "auto"
    if not auto and not arguments.rank.lstrip("-").isdigit():
        raise ValueError(f"rank is {arguments.rank!r}, needed a multiple of 16, or auto")
    recipe = Recipe.named(
        arguments.recipe or ("fast" if statistics is None else "balanced"),
        format=arguments.format,
        rank=32 if auto else int(arguments.rank),
        auto_rank=auto,
        branches=arguments.branches,
        activation=arguments.activation,
        target_size=bytes_of(arguments.target_size),
        fallback=arguments.fallback,
        act8_share=arguments.act8_share,
        seed=arguments.seed,
    )
    report = quantize_model(
        FileSource(arguments.source),
        Target(target, arguments.resume, Beside.of_file(arguments.source) if arguments.whole else None),
        recipe,
        None if arguments.json else show,
        _usable(arguments.device),
        statistics,
    )
    if folder is not None:
        write_report(report, folder)
    data = summarize(report)
    result = {
        "file": str(report.path),
        "family": report.family,
        "layers": len(report.errors),
        "bytes_4bit": report.bytes_4bit,
        "bytes_16bit": report.bytes_16bit,
        "mean_error": data["mean_weight_error"],
        "mean_output_error": data["mean_output_error"],
        "errors": dict(report.errors),
        "eight": dict(report.eight),
        "kept": dict(report.kept),
        "notes": list(report.notes),
        "resumed": report.resumed,
        "peak_memory": report.peak_memory,
        "seconds": time.perf_counter() - start,
    }
    measured = data["mean_output_error"]
    text = (
        f"{report.path}: {len(report.errors)} layers of family {report.family}, {data['ratio'] or 0:.2f}x smaller, "
        f"mean weight error {data['mean_weight_error'] or 0:.4f}, "
        + ("" if measured is None else f"mean output error {measured:.4f}, ")
        + f"{result['seconds']:.1f} s"
    )
    return result, "\n".join([text, *report.notes])


def _usable(device: str) -> str:
    """The device, if a number can be computed on it. Raises ValueError otherwise, with torch's reason."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device is {device!r}, needed one that torch computes on here, e.g. cpu: {reason}") from error
    return device


def _merge(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    merge(arguments.sources, target_of(arguments, *arguments.sources))
    return inspect_statistics(arguments.target)
