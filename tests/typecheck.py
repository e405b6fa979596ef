"""Check the types of the pack: `python tests/typecheck.py [kernels] [quantize] [nodes]`, all three by default.

Options of mypy may follow.

The pack imports itself relatively and its folder may have a name that is no identifier, which mypy refuses to enter. It
is checked under the name that the tests import it by, through a link in a temporary folder. Named layers alone are
reported; what they import is read, but silently. Settings: [tool.mypy] in pyproject.toml. The exit status is mypy's.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "quantize", "nodes")
NAME = "svdquant_pack"


def main(arguments: list[str]) -> int:
    layers = [each for each in arguments if not each.startswith("-")]
    if unknown := sorted(set(layers) - set(LAYERS)):
        print(f"no such layer: {', '.join(unknown)}, known are {', '.join(LAYERS)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, NAME).symlink_to(ROOT, target_is_directory=True)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), *(each for each in arguments if each.startswith("-"))]
        if layers:
            command += ["--follow-imports", "silent"]
        for layer in layers or LAYERS:
            command += ["-p", f"{NAME}.{layer}"]
        environment = {name: value for name, value in os.environ.items() if name != "MYPYPATH"}
        done = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE)
    print(done.stdout.replace(f"{NAME}{os.sep}", ""), end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
