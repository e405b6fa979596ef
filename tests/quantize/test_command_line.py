"""`python -m quantize` as a user types it, without ComfyUI."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svdquant_pack.quantize.calibration.file import Statistics
from svdquant_pack.quantize.cli.main import main
from svdquant_pack.tests.quantize.stored_models import legacy_folder

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


def test_the_older_folder_of_two_files_is_one_model(quantized, tmp_path):
    single = tmp_path / "single.safetensors"
    assert run("convert", quantized, single, "--to", "nunchaku").returncode == 0
    folder = legacy_folder(tmp_path / "svdq-int4-digits", single)
    found = json.loads(run("inspect", folder, "--json").stdout)
    whole = json.loads(run("inspect", single, "--json").stdout)
    assert found["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    same = ("dialect", "family", "formats", "ranks", "layers", "bytes_16bit")
    assert {key: found[key] for key in same} == {key: whole[key] for key in same} and found["file"] == folder.name
    assert "no linear layer differs" in run("compare", folder, single).stdout
    errors = json.loads(run("compare", DEMO, folder, "--json").stdout)["errors"]
    assert len(errors) == 26 and max(errors.values()) < 0.2
    done = run("quantize", folder, tmp_path / "x.safetensors")
    assert done.returncode == 1 and "is a 4-bit model already (nunchaku)" in done.stderr


def test_the_same_run_gives_the_same_bytes(quantized, tmp_path):
    again = tmp_path / "again.safetensors"
    assert run("quantize", DEMO, again, "--format", "int4", "--rank", 16).returncode == 0
    assert again.read_bytes() == quantized.read_bytes()


def test_it_runs_from_anywhere_by_path(quantized, tmp_path):
    done = run("inspect", quantized, where=tmp_path, program=(ROOT / "quantize",))
    assert done.returncode == 0 and "flux" in done.stdout


@pytest.mark.parametrize("command", ["quantize", "convert", "merge"])
def test_a_file_that_is_there_is_replaced_only_on_request(quantized, tmp_path, command):
    seen = Statistics.create(tmp_path / "s.safetensors", {"blocks.0.proj": 64}, 64, {"family": "generic"}).path
    names = {"quantize": (DEMO, "--rank", 16), "convert": (quantized, "--to", "kitchen"), "merge": (seen,)}
    source, *options = names[command]
    out = tmp_path / "out.safetensors"
    order = (out, source) if command == "merge" else (source, out)
    out.write_bytes(b"my own model")
    done = run(command, *order, *options)
    assert done.returncode == 1 and f"error: {out}: is there already; choose another name, or --ov" in done.stderr
    assert out.read_bytes() == b"my own model"
    done = run(command, *order, *options, "--overwrite")
    assert done.returncode == 0 and out.read_bytes() != b"my own model", done.stderr
    before = Path(source).read_bytes()
    done = run(command, source, source, *options, "--overwrite")
    assert done.returncode == 1 and "is what is read, needed the name of another" in done.stderr
    assert Path(source).read_bytes() == before


@pytest.mark.parametrize("device", ["meta", "x", "", "cuda:99", "cpu:-1"])
def test_a_device_that_computes_nothing_is_refused_before_anything_is_read(tmp_path, capsys, device):
    """Each was a traceback of torch."""
    assert main(["quantize", str(DEMO), str(tmp_path / "out.safetensors"), "--device", device]) == 1
    assert capsys.readouterr().err.startswith(f"error: device is {device!r}, needed one")
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line_whatever_a_tensor_is_called(tmp_path, capsys):
    """The end of a line, or a terminal's commands, in a name came out as they are."""
    path = tmp_path / "x.safetensors"
    save_file({"a\n\x1b[2J.proj_down": torch.zeros(1)}, path, {"svdquant": "{}"})
    assert main(["inspect", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: x.safetensors: ") and "\x1b" not in said


@pytest.mark.skipif(os.name == "nt", reason="names there are text")
def test_a_file_whose_name_is_no_text_is_refused_in_one_line(quantized, tmp_path):
    name = os.fsdecode(b"\xff.safetensors")
    try:
        shutil.copy(quantized, tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    done = run("inspect", tmp_path / name)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "\\udcff.safetensors: its name is no text in UTF-8" in done.stderr


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
        (("quantize", DEMO, out, "--fallback", "nan"), "fallback is nan, needed a relative error"),
        (("quantize", DEMO, tmp_path), "is a folder, needed the name of a file"),
        (("compare", DEMO, empty), "no linear layer in common"),
    ):
        done = run(*arguments)
        assert done.returncode == 1 and done.stdout == "", arguments
        assert message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("error: ") == 1 and "error: " in done.stderr.strip().splitlines()[-1]
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune this GPU")
def test_tune_says_what_it_needs(quantized, tmp_path):
    for arguments in (("--shapes", "flux"), ("--model", quantized)):
        done = run("tune", *arguments)
        assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
        assert "error: tune times kernels on a GPU, and torch" in done.stderr
    assert "holds no 4-bit layers" in run("tune", "--model", DEMO).stderr
    done = run("tune", "--model", "")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert run("tune").returncode == 2


def test_tune_measures_the_ways_of_a_cpu_and_keeps_them(quantized, monkeypatch, tmp_path, capsys):
    """In this process, as a user types it; then as a new process would."""
    from svdquant_pack.kernels import dispatch, measured, rivals
    from svdquant_pack.quantize.files.open import open_checkpoint

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr(rivals, "ROWS", (128,))
    measured.known.cache_clear()
    assert main(["tune", "--model", str(quantized), "--cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"kept in {measured.path()}, for layers that are loaded with compute=measured"
    specs = {(spec.kind, spec.n, spec.k): spec for spec in open_checkpoint(quantized).specs.values() if spec.rank}
    assert len(lines) == len(specs) + 1 and any("int4 partly unsigned" in line for line in lines)
    measured.known.cache_clear()
    dispatch.forget_choices()
    for spec in specs.values():
        choice = dispatch.choose(spec, torch.device("cpu"), torch.float32, "measured", 128)
        said = f" {spec.n} x {spec.k}, 128 rows: {choice.backend.name} {choice.compute}"
        assert choice.measured is not None and any(said in line for line in lines)
    assert main(["tune", "--model", str(quantized), "--cpu", "--json", "--compute", "w4a4"]) == 0
    assert json.loads(capsys.readouterr().out) == {}, "of one mode launch settings are tuned alone, and a CPU has none"
    measured.known.cache_clear()


def test_tune_knows_the_layers_of_a_file_and_of_known_models(quantized):
    from svdquant_pack.quantize.cli.tune import layers_of

    of_file = layers_of(Namespace(model=quantized, shapes=None))
    assert of_file.total() == 26 and {format for format, *_ in of_file} == {"int4", "awq_w4a16"}
    known = layers_of(Namespace(model=None, shapes="flux", format="nvfp4", rank=128))
    assert known["nvfp4", 3072, 15360, 128] == 1 and known["awq_w4a16", 18432, 3072, 0] == 1 and len(known) == 7


@pytest.mark.parametrize("command", ["quantize", "convert", "merge"])
@pytest.mark.parametrize("name", ["CON.safetensors", "a:b", "x.", "a\\b", "n" * 256])
def test_what_is_written_has_a_name_on_every_system(command, name, tmp_path, capsys):
    order = (tmp_path / name, DEMO) if command == "merge" else (DEMO, tmp_path / name)
    assert main([command, *map(str, order), *(("--to", "native") if command == "convert" else ())]) == 1
    assert "is no name for a new file: " in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_report_is_replaced_only_on_request(tmp_path, capsys):
    save_file({"blocks.0.proj.weight": torch.randn(128, 128)}, tmp_path / "wide.safetensors")
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.md").write_text("my own")
    command = ["quantize", str(tmp_path / "wide.safetensors"), str(tmp_path / "x.safetensors"), "--rank", "16"]
    assert main([*command, "--report", str(folder)]) == 1
    assert "report.md: is there already; choose another folder, or --over" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists() and (folder / "report.md").read_text() == "my own"
    assert main([*command, "--report", str(folder / "report.md")]) == 1
    assert "is a file, needed a folder" in capsys.readouterr().err
    assert main([*command, "--report", str(folder), "--overwrite"]) == 0
    assert json.loads((folder / "report.json").read_text())["family"] == "generic"
    assert (folder / "report.md").read_text().startswith("# x.safetensors")
    assert main([*command, "--overwrite", "--report", "CON"]) == 1 and "is a device" in capsys.readouterr().err


def test_statistics_are_not_replaced_by_the_model_made_with_them(tmp_path, capsys):
    path = Statistics.create(tmp_path / "s.safetensors", {"blocks.0.proj": 64}, 64, {"family": "generic"}).path
    assert main(["quantize", str(DEMO), str(path), "--statistics", str(path), "--overwrite"]) == 1
    assert "is what is read" in capsys.readouterr().err
