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


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="builds a libcuda that does nothing")
def test_every_launch_takes_the_variant_that_triton_takes():
    """Types, alignment, numbers and flags vary; each launch is made twice, once to find and once to know."""
    code = """
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("tests_conftest", "tests/conftest.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))
runpy.run_path("tests/kernels/start_cases.py")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "kernels 32 launches 192\n"
