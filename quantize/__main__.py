"""Command line: inspect, quantize, compare. Runs as `python -m quantize` in the pack folder, without ComfyUI.

This is an entry point, above all layers: it adds the commands that know ComfyUI to those of the quantizer.
"""

import sys

if __package__ != "svdquant_pack.quantize":  # started on its own: load the pack under one fixed name, then re-enter
    import importlib.util
    import runpy
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("svdquant_pack", root / "__init__.py")
    assert spec is not None and spec.loader is not None  # a file that is there has both
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    runpy.run_module("svdquant_pack.quantize", run_name="__main__", alter_sys=True)
    sys.exit(0)

from ..nodes.remote import add_commands
from .cli.main import main

sys.exit(main(sys.argv[1:], [add_commands]))
