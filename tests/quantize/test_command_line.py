"""`python -m quantize` as a user types it, without ComfyUI."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "workflows" / "models" / "diffusion_models" / "svdquant_demo_digits.safetensors"


def run(*arguments, where=ROOT, program=("-m", "quantize")) -> subprocess.CompletedProcess:
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "int4.safetensors"
    done = run("quantize", DEMO, path, "--format", "int4", "--rank", 16, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["family"] == "flux" and result["layers"] == 26 and result["mean_error"] < 0.08
    assert result["bytes_16bit"] / result["bytes_4bit"] > 2.5
    return path


def test_inspect(quantized):
    found = json.loads(run("inspect", quantized, "--json").stdout)
    assert found["formats"] == {"int4": 20, "awq_w4a16": 6} and found["ranks"] == {"16": 20}
    assert found["layers"]["single_blocks.0.linear2"]["unsigned"] == [128, 640]
    assert found["bytes"] == quantized.stat().st_size and len(found["source_hash"]) == 64
    assert "flux" in run("inspect", quantized).stdout


def test_compare_sorts_the_worst_layer_first(quantized):
    errors = list(json.loads(run("compare", DEMO, quantized, "--json").stdout)["errors"].values())
    assert len(errors) == 26 and errors == sorted(errors, reverse=True) and 0 < errors[-1] < errors[0] < 0.2
    assert "no linear layer differs" in run("compare", quantized, quantized).stdout


def test_the_same_run_gives_the_same_bytes(quantized, tmp_path):
    again = tmp_path / "again.safetensors"
    assert run("quantize", DEMO, again, "--format", "int4", "--rank", 16).returncode == 0
    assert again.read_bytes() == quantized.read_bytes()


def test_it_runs_from_anywhere_by_path(quantized, tmp_path):
    done = run("inspect", quantized, where=tmp_path, program=(ROOT / "quantize",))
    assert done.returncode == 0 and "flux" in done.stdout


def test_bad_input_is_one_line_and_leaves_nothing(quantized, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(quantized.read_bytes()[:5000])
    poisoned = tmp_path / "nan.safetensors"
    save_file({"blocks.0.proj.weight": torch.full((128, 128), float("nan"))}, poisoned)
    empty = tmp_path / "empty.safetensors"
    save_file({"norm.weight": torch.ones(4)}, empty)
    out = tmp_path / "out.safetensors"
    for arguments, message in (
        (("inspect", cut), "cut.safetensors: not a whole safetensors file"),
        (("inspect", DEMO), "holds no 4-bit layers"),
        (("inspect", tmp_path / "gone"), "no such file"),
        (("quantize", quantized, out), "is a 4-bit model already"),
        (("quantize", poisoned, out), "blocks.0.proj.weight holds NaN or Inf"),
        (("quantize", empty, out), "no linear layer"),
        (("quantize", DEMO, out, "--rank", 20), "multiple of 16"),
        (("compare", DEMO, empty), "no linear layer in common"),
    ):
        done = run(*arguments)
        assert done.returncode == 1 and done.stdout == "", arguments
        assert message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("error: ") == 1 and "error: " in done.stderr.strip().splitlines()[-1]
    assert not out.exists() and not list(tmp_path.glob(".*"))
