"""Run ComfyUI's main.py for `server.Host`: with the CPU shims, and no longer than the process that started it.

    python launch.py COMFYUI_FOLDER [ComfyUI's own arguments]

Standard input is the leash: a pipe that the starting process holds open. However that process ends, the pipe
closes with it, and so no server outlives a killed test run.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from pathlib import Path

import cpu_shims


def _end_when_stdin_closes() -> None:
    while os.read(0, 64):
        pass
    os._exit(1)


def main() -> None:
    tree, *arguments = sys.argv[1:]
    threading.Thread(target=_end_when_stdin_closes, daemon=True).start()
    cpu_shims.install()
    script = Path(tree, "main.py")
    # as if `python main.py` had been typed: our own folder must not shadow ComfyUI's `server` module
    sys.path[0] = str(script.parent)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
