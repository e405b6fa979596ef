"""The demo model samples through the Triton kernels, in Triton's interpreter, and paints the reference's pictures.

In a process of its own: TRITON_INTERPRET is read when a kernel is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("comfy.sd", reason="no ComfyUI: set COMFYUI_PATH")
pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOOR = 50  # dB


@pytest.mark.skipif(INTERPRETED, reason="is the process that the other test starts")
def test_the_demo_model_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0 and "2 passed" in done.stdout, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


@pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_triton_paints_the_pictures_of_the_reference(checkpoints, monkeypatch, format):
    from svdquant_pack.kernels import dispatch
    from svdquant_pack.kernels.backends import discover, reference
    from svdquant_pack.nodes.host.describe import describe_model
    from svdquant_pack.nodes.host.model import load_model
    from svdquant_pack.tests.kernels import interpreter_shim
    from svdquant_pack.tests.nodes.sampling import pictures

    interpreter_shim.install()
    painted = []
    for backends in (discover()[0], {"reference": reference.BACKEND}):
        monkeypatch.setattr(dispatch, "discover", lambda backends=backends: (backends, {}))
        monkeypatch.setattr(dispatch, "_chosen", {})
        model = load_model(str(checkpoints[format]), "w4a4")
        used = {found["backend"] for found in describe_model(model)["backends"].values()}
        assert used == {"triton" if "triton" in backends else "reference"}
        painted.append(pictures(model, count=10, steps=2))
    difference = (painted[0] - painted[1]).square().mean()
    assert -10 * difference.log10() >= FLOOR
