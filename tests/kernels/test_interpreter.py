"""Every Triton kernel in Triton's interpreter, on a CPU: test_triton_*.py in one process with TRITON_INTERPRET=1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from svdquant_pack.kernels.backends.triton import versions

if reason := versions.missing():
    pytest.skip(reason, allow_module_level=True)
HERE = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(HERE.glob("test_triton_*.py")), ids=lambda file: file.stem)
def test_kernels_are_right_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout and " skipped" not in done.stdout
