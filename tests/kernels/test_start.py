"""A kernel is started in the variant that Triton would choose, without asking it again."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from svdquant_pack.kernels.backends.triton import versions

if reason := versions.missing():
    pytest.skip(reason, allow_module_level=True)
ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="builds a libcuda that does nothing"
)


def output_of(script: str) -> str:
    code = f"""
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("tests_conftest", "tests/conftest.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))
runpy.run_path("tests/kernels/{script}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_launch_takes_the_variant_that_triton_takes():
    """Types, alignment, numbers and flags vary; each launch is made twice, once to find and once to know."""
    assert output_of("start_cases.py") == "kernels 32 launches 192\n"


def test_a_first_lora_compiles_nothing():
    """A quantizer and a product for few rows, and for many; one more quantizer where 64 columns are not enough."""
    found = dict(map(int, line.split()) for line in output_of("lora_cases.py").splitlines())
    assert found == {0: 4, 16: 4, 32: 4, 96: 5, 48: 5, 128: 5}
