"""Hundreds of prompts from several clients at once to a real ComfyUI, with faults, and what must hold meanwhile.

    make soak                    300 prompts; SVDQUANT_SOAK=1000 make soak for another number
    python tests/soak.py --prompts 300 --seed 7 --comfyui PATH

It exits with 1 where one of these was missed:

    every prompt ends within 60 s of its start, and the server lives to the end
    an error is one that this prompt may end in, of a type that is raised on purpose; a wrong input never passes
    the same model, LoRAs, compute mode and seed give the same pixels, those of a server that has done nothing else
    memory and open files at the end are those after the first fifth of the prompts, within the bounds below
    no file is where nobody asked for one; a hidden file is only where a run was stopped, and gone after `clean`
    every file that was written is a whole model
"""

import argparse
import importlib.util
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "ComfyUI"
    parser.add_argument("--comfyui", type=Path, default=default, help="ComfyUI source tree (default: COMFYUI_PATH)")
    parser.add_argument("--prompts", type=int, default=int(os.environ.get("SVDQUANT_SOAK", "300")))
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--longest", type=float, default=60, help="seconds that a prompt may take (60)")
    options = parser.parse_args(arguments)
    spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests" / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    from svdquant_pack.tests.soak_run import soak

    return soak(options.comfyui, options.prompts, options.seed, options.longest)


if __name__ == "__main__":
    sys.exit(main())
