"""A number format, a kernel backend, a checkpoint dialect and a model family are one file each, in their folder.

A copy of the pack gets the four files of `drop_in/` and no other change; `drop_in/checks.py` then runs in it.
CONTRIBUTING.md points at these files.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DROPPED = Path(__file__).parent / "drop_in"
CHECKS = "tests/drop_in/checks.py"
WIDGETS = "tests/nodes/widgets.py"
PYTEST = ("pytest", "-q", "-x", "-p", "no:cacheprovider", "--basetemp=tests/made")
NEEDED = (
    "__init__.py",
    "pyproject.toml",
    "tests/conftest.py",
    "tests/slow.txt",
    "tests/kernels/interpreter_shim.py",
    "tests/host/cpu_shims.py",
    "tests/nodes/conftest.py",
)
ADDED = {
    "kernels/formats/dummy.py",
    "kernels/backends/dummy.py",
    "quantize/files/dialects/dummy.py",
    "quantize/families/dummy.py",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The pack with four files more, in a folder of another name."""
    folder = tmp_path_factory.mktemp("copy") / "a pack"
    without = shutil.ignore_patterns("__pycache__", "*.pyc", "*.nbc", "*.nbi")
    for part in ("kernels", "quantize", "nodes"):
        shutil.copytree(ROOT / part, folder / part, ignore=without)
    for part in (*NEEDED, CHECKS):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / part, folder / part)
    shutil.copy(DROPPED / "widgets.py", folder / WIDGETS)
    for part in ADDED:
        assert not (folder / part).exists()
        shutil.copy(DROPPED / part, folder / part)
    return folder


def run(copy: Path, *command: str, **environment: str) -> str:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "", **environment}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=copy, env=settings, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_four_files_are_all_there_is():
    found = {path.relative_to(DROPPED).as_posix() for path in DROPPED.rglob("*.py")}
    assert found == ADDED | {"checks.py", "widgets.py"}


def test_contributing_points_at_them():
    """Every link of CONTRIBUTING.md leads to a file, and every example is linked."""
    links = set(re.findall(r"\]\(([^)]+)\)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {f"tests/drop_in/{part}" for part in ADDED} <= links
    assert all((ROOT / link).is_file() for link in links)


def test_one_file_each_is_enough(copy):
    output = run(copy, *PYTEST, CHECKS, TRITON_INTERPRET="0")
    assert " passed" in output and "1 skipped" in output


def test_a_kernel_backend_that_was_there_runs_the_format(copy):
    pytest.importorskip("triton")
    output = run(copy, *PYTEST, CHECKS, "-k", "triton", TRITON_INTERPRET="1")
    assert "1 passed" in output and "skipped" not in output


@pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="COMFYUI_PATH names no ComfyUI; `make test` sets it")
def test_the_nodes_offer_them(copy):
    assert "1 passed" in run(copy, *PYTEST, WIDGETS)


def test_the_command_line_knows_them(copy, tmp_path):
    """The same through `python -m quantize`, as a user has it."""
    import torch
    from safetensors.torch import save_file

    weights = {f"towers.0.{layer}.weight": torch.randn(64, 64).bfloat16() for layer in ("up", "gate", "down")}
    save_file(weights, tmp_path / "model.safetensors")
    names = [str(tmp_path / f"{name}.safetensors") for name in ("model", "native", "dummy")]
    run(copy, "quantize", "quantize", *names[:2], "--format", "dummy", "--rank", "16", "--json")
    run(copy, "quantize", "convert", *names[1:], "--to", "dummy", "--json")
    found = json.loads(run(copy, "quantize", "inspect", names[2], "--json"))
    assert (found["family"], found["dialect"], found["formats"]) == ("dummy", "dummy", {"dummy": 3})
