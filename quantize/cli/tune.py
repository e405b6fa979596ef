"""The command tune, for the layers of a model: the fastest launch settings of Triton's kernels on this GPU, then which
backend and mode is the fastest, for who loads it with compute=measured."""

import argparse
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch

from ...kernels import COMPUTES, FORMATS, LayerSpec, measured
from ...kernels.formats import DEFAULT, MODULATION
from ...kernels.measured import Measured
from ...kernels.modes import AUTO, MEASURED
from ...kernels.rivals import dtype_on, kinds, measure
from ..files.lifecycle import write_whole
from ..files.open import open_checkpoint
from ..recipe import WITH_BRANCH
from . import show

# (N, K) of the linear layers of well-known models, most work first
SHAPES = {
    "flux": {
        "single.linear1": (21504, 3072),
        "single.linear2": (3072, 15360),
        "mlp.0": (12288, 3072),
        "mlp.2": (3072, 12288),
        "qkv": (9216, 3072),
        "proj": (3072, 3072),
    },
    "qwen_image": {"to_q": (3072, 3072), "img_mlp.0": (12288, 3072), "img_mlp.2": (3072, 12288)},
    "z_image": {"qkv": (11520, 3840), "out": (3840, 3840), "w1": (10240, 3840), "w2": (3840, 10240)},
    "sdxl": {"ff.0": (10240, 1280), "ff.2": (1280, 5120), "to_q": (1280, 1280), "small.to_q": (640, 640)},
}
# first channel of those behind a GELU, where others come before them
UNSIGNED = {"flux": {"single.linear2": 3072}}
# of layers that see one row per image
MODULATION_SHAPES = {"flux": {"modulation": (18432, 3072)}, "qwen_image": {"img_mod": (18432, 3072)}}


def add_commands(commands: Any) -> None:
    """Add the parser of this command to those of `python -m quantize`."""
    command = commands.add_parser("tune", help="find the fastest kernels and settings for this GPU, and keep them")
    layers = command.add_mutually_exclusive_group(required=True)
    layers.add_argument("--model", metavar="FILE", help="a 4-bit file, whose layers are timed")
    layers.add_argument("--shapes", choices=SHAPES, help="the layer sizes of a well-known model")
    command.add_argument("--format", choices=WITH_BRANCH, default=DEFAULT, help="of --shapes")
    command.add_argument("--rank", type=int, default=32, help="of --shapes")
    command.add_argument("--compute", choices=COMPUTES, default="auto", help="the mode whose kernels are tuned")
    command.add_argument("--cpu", action="store_true", help="measure the ways of this machine's CPU instead of a GPU's")
    command.set_defaults(run=_tune)


def specs_of(arguments: argparse.Namespace) -> list[LayerSpec]:
    """Every layer of --model; of --shapes each size once"""
    if arguments.model is not None:
        return list(open_checkpoint(arguments.model).specs.values())
    rank, fmt = arguments.rank, FORMATS[arguments.format]
    unsigned = UNSIGNED.get(arguments.shapes, {}) if fmt.unsigned_act else {}
    found = [
        LayerSpec(arguments.format, n, k, rank, (unsigned[name], k) if name in unsigned else (0, 0))
        for name, (n, k) in SHAPES[arguments.shapes].items()
    ]
    return found + [LayerSpec(MODULATION, *shape) for shape in MODULATION_SHAPES.get(arguments.shapes, {}).values()]


def layers_of(arguments: argparse.Namespace) -> Counter[tuple[str, int, int, int]]:
    """{(format, N, K, rank): number of such layers}"""
    return Counter((spec.format, spec.n, spec.k, spec.rank) for spec in specs_of(arguments))


def _tune(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    specs, say = specs_of(arguments), None if arguments.json else show
    if not arguments.cpu and not torch.cuda.is_available():
        raise ValueError(
            f"tune times kernels on a GPU, and torch {torch.__version__} sees none on this machine. "
            "Run it with the Python of a ComfyUI that samples on its GPU; --cpu measures the ways of this CPU"
        )
    device = torch.device("cpu") if arguments.cpu else torch.device("cuda", torch.cuda.current_device())
    try:
        data, text = ({}, "") if arguments.cpu else _tune_triton(arguments, device)
        if arguments.compute in (AUTO, MEASURED):
            found = measure(kinds(specs), device, dtype_on(device), write_whole, say)
            data, text = data | {"measured": [asdict(each) for each in found]}, text + compared(found)
    except RuntimeError as error:  # out of memory is one
        raise ValueError(f"nothing was tuned: {error}") from error
    return data, text


def _tune_triton(arguments: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], str]:
    """The launch settings of Triton's kernels, where they are there."""
    try:
        from ...kernels.backends.triton import tune
    except ImportError as error:
        return {"not_tuned": str(error)}, f"no launch settings were tuned, Triton's kernels are not there: {error}\n"
    shapes = [tune.LayerShape(*key, count=count) for key, count in layers_of(arguments).items()]
    found, path = tune.tune(shapes, device, write_whole, arguments.compute, None if arguments.json else show)
    data, text = report(found, str(path))
    return data, text + "\n"


def compared(found: list[Measured]) -> str:
    """What was measured, a line for each kind of layer and number of rows."""
    lines = []
    for each in found:
        kind, others = each.kind, [way for way in each.timed if way != each.chosen]
        beside = ", ".join(f"{way.name} {way.seconds / each.chosen.seconds:.2f}" for way in others)
        unsigned = " partly unsigned" if kind.partly_unsigned else ""
        lines.append(
            f"{kind.format}{unsigned} {kind.n} x {kind.k}, {kind.rows} rows: {each.chosen.name}"
            + ("" if each.chosen == each.tabled else f" in place of {each.tabled.name}")
            + (f"; times its time: {beside}" if beside else "")
        )
    return "\n".join([*lines, f"kept in {measured.path()}, for layers that are loaded with compute={MEASURED}"])


def report(found: list[Any], path: str) -> tuple[dict[str, Any], str]:
    """The result of `kernels/backends/triton/tune.py`, as data and as text."""
    entries = [
        {
            "kernel": each.kernel,
            "rows": each.rows,
            "settings": dict(each.settings),
            "seconds": each.seconds,
            "shipped_seconds": each.shipped_seconds,
            "left_out": dict(each.left_out),
        }
        for each in found
    ]
    lines = [
        f"{each.kernel:16s} rows {each.rows or 'any':>4}  {each.seconds / each.shipped_seconds:5.2f} "
        f"of the layers' time as shipped  {' '.join(f'{key}={value}' for key, value in each.settings.items())}"
        for each in found
    ]
    if not found:
        lines.append("no layer of this model runs on Triton's kernels here, there is nothing to tune")
    return {"file": path, "entries": entries}, "\n".join([*lines, f"written to {path}"])
