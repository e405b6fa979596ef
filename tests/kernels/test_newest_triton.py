"""A part of the interpreter tests on the newest Triton, which is fetched once into .host (`make clean` forgets it)."""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".host" / "triton-newest"
# each kernel in the type models use, with everything that is rounded, masked or passed on
SELECTION = "bfloat16 and not silu or requantized or unsigned or rows or nan"
FILES = [f"tests/kernels/test_triton_{name}.py" for name in ("gemm", "quantize", "expand", "layers")]
LEAST = 100  # tests that this has to select


def fetch() -> str | None:
    """Put the newest Triton into FOLDER unless there is one. Returns why that cannot be done, or None."""
    if FOLDER.is_dir():
        return None
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
        target = Path(scratch) / "triton"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        command += ["--retries", "1", "--timeout", "20", "--target", str(target), "triton"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"pip could not fetch triton: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        target.rename(FOLDER)
    return None


@pytest.fixture(scope="module")
def newest() -> str:
    """Its version, where it is another one than the installed."""
    if reason := fetch():
        pytest.skip(reason)
    (found,) = [each.version for each in distributions(name="triton", path=[str(FOLDER)])]
    try:
        if found == version("triton"):
            pytest.skip(f"the installed triton {found} is the newest, test_interpreter.py runs all of it")
    except PackageNotFoundError:
        pass
    return found


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment["PYTHONPATH"] = str(FOLDER)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)


def test_kernels_are_right_in_the_interpreter_of_the_newest_triton(newest):
    done = run("-c", "import triton; print(triton.__version__)")
    assert done.stdout.strip() == newest, done.stderr
    done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES, "-k", SELECTION)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    passed = done.stdout.strip().splitlines()[-1].split(" passed")[0]
    assert passed.isdigit() and int(passed) >= LEAST and " skipped" not in done.stdout, done.stdout[-500:]
