"""Command line: inspect, quantize, compare. Runs as `python -m quantize` in the pack folder, without ComfyUI."""

import sys

if __package__ != "svdquant_pack.quantize":  # started on its own: load the pack under one fixed name, then re-enter
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    # started by path, this folder is first on sys.path: our `inspect` would be taken for Python's
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root / "quantize"]
    import importlib.util
    import runpy

    spec = importlib.util.spec_from_file_location("svdquant_pack", root / "__init__.py")
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    runpy.run_module("svdquant_pack.quantize", run_name="__main__", alter_sys=True)
    sys.exit(0)

from .command_line import main

sys.exit(main(sys.argv[1:]))
