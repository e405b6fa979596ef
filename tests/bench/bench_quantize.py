"""Measure the quantizer against the reference recipe in the same code base. Prints one table per section.

    COMFYUI_PATH=<ComfyUI folder> python tests/bench/bench_quantize.py [--check] [--seed N] [--only SECTION ...]

Sections: trained (the demo FLUX, 22 linear units), synthetic, speed, large, cost, memory, groups. Every row comes from
this run; all seeds are printed. With --check the exit status is 1 where a figure is missed. `ours` is the recipe `best`
with our activation rules, `stock` the same with those of stock kernels. Nothing was ever tuned on the seeds of the
default.
"""

import importlib.util
import sys
from pathlib import Path


def load_pack() -> None:
    """Make `svdquant_pack` importable, as pytest's conftest does."""
    path = Path(__file__).resolve().parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("conftest", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


if __name__ == "__main__":
    load_pack()
    figures = importlib.import_module("svdquant_pack.tests.bench.quantizer_figures")
    sys.exit(figures.main(__doc__))
