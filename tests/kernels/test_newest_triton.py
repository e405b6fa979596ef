"""A part of the interpreter tests on the newest Triton and on the oldest that is not refused.

Each is fetched once into .host (`make clean` forgets it).
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"triton": ROOT / ".host" / "triton-newest", "triton==3.5.1": ROOT / ".host" / "triton-oldest"}
# each kernel in the type models use, with everything that is rounded, masked or passed on
SELECTION = "bfloat16 and not silu or requantized or unsigned or rows or nan"
FILES = [f"tests/kernels/test_triton_{name}.py" for name in ("gemm", "quantize", "expand", "layers")]
LEAST = 100  # tests that this has to select


def fetch(package: str, folder: Path) -> str | None:
    """Put `package` into `folder` unless it is there. Returns why that cannot be done, or None."""
    if folder.is_dir():
        return None
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        target = Path(scratch) / "triton"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        command += ["--retries", "1", "--timeout", "20", "--target", str(target), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"pip could not fetch {package}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        target.rename(folder)
    return None


@pytest.fixture(scope="module", params=FOLDERS, ids=["newest", "oldest"])
def other(request) -> tuple[Path, str]:
    """(folder, version) of a Triton that is not the installed one."""
    folder = FOLDERS[request.param]
    if reason := fetch(request.param, folder):
        pytest.skip(reason)
    (found,) = [each.version for each in distributions(name="triton", path=[str(folder)])]
    try:
        if found == version("triton"):
            pytest.skip(f"triton {found} is the installed one, test_interpreter.py runs all of it")
    except PackageNotFoundError:
        pass
    return folder, found


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)


def test_kernels_are_right_in_the_interpreter_of_another_triton(other):
    folder, found = other
    done = run(folder, "-c", "import triton; print(triton.__version__)")
    assert done.stdout.strip() == found, done.stderr
    done = run(folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES, "-k", SELECTION)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    passed = done.stdout.strip().splitlines()[-1].split(" passed")[0]
    assert passed.isdigit() and int(passed) >= LEAST and " skipped" not in done.stdout, done.stdout[-500:]
