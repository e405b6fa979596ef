"""The command tune: the fastest launch settings of Triton's kernels on this GPU, for the layers of a model."""

import argparse
from collections import Counter
from typing import Any

import torch

from ...kernels import COMPUTES
from ...kernels.formats import DEFAULT, MODULATION
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
# of layers that see one row per image
MODULATION_SHAPES = {"flux": {"modulation": (18432, 3072)}, "qwen_image": {"img_mod": (18432, 3072)}}


def add_commands(commands: Any) -> None:
    """Add the parser of this command to those of `python -m quantize`."""
    command = commands.add_parser("tune", help="find the fastest launch settings for this GPU, and keep them")
    layers = command.add_mutually_exclusive_group(required=True)
    layers.add_argument("--model", metavar="FILE", help="a 4-bit file, whose layers are timed")
    layers.add_argument("--shapes", choices=SHAPES, help="the layer sizes of a well-known model")
    command.add_argument("--format", choices=WITH_BRANCH, default=DEFAULT, help="of --shapes")
    command.add_argument("--rank", type=int, default=32, help="of --shapes")
    command.add_argument("--compute", choices=COMPUTES, default="auto", help="the mode whose kernels are tuned")
    command.set_defaults(run=_tune)


def layers_of(arguments: argparse.Namespace) -> Counter[tuple[str, int, int, int]]:
    """{(format, N, K, rank): number of such layers}; of --shapes each is there once"""
    if arguments.model is not None:
        specs = open_checkpoint(arguments.model).specs.values()
        return Counter((spec.format, spec.n, spec.k, spec.rank) for spec in specs)
    found = Counter((arguments.format, *shape, arguments.rank) for shape in SHAPES[arguments.shapes].values())
    return found + Counter((MODULATION, *shape, 0) for shape in MODULATION_SHAPES.get(arguments.shapes, {}).values())


def _tune(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    layers = layers_of(arguments)
    if not torch.cuda.is_available():
        raise ValueError(
            f"tune times kernels on a GPU, and torch {torch.__version__} sees none on this machine. "
            "Run it with the Python of a ComfyUI that samples on its GPU"
        )
    try:
        from ...kernels.backends.triton import tune
    except ImportError as error:
        raise ValueError(f"Triton's kernels are what is tuned, and they are not there: {error}") from error
    shapes = [tune.LayerShape(*key, count=count) for key, count in layers.items()]
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        found, path = tune.tune(shapes, device, write_whole, arguments.compute, None if arguments.json else show)
    except RuntimeError as error:  # out of memory is one
        raise ValueError(f"nothing was tuned: {error}") from error
    return report(found, str(path))


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
