"""`python -m quantize verify`: what is whole, what is damaged and in which tensor, and what nobody can know."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.calibration.file import Statistics
from svdquant_pack.quantize.cli.main import main
from svdquant_pack.quantize.files.convert import TARGETS, convert_file
from svdquant_pack.tests.quantize.stored_models import legacy_folder, save_model, stored_model
from svdquant_pack.tests.quantize.test_damaged_statistics import fill
from svdquant_pack.tests.quantize.test_integrity import dropped, edit, flipped, overwritten, string, write

NAN = b"\xc1\x7f"


@pytest.fixture
def run(capsys):
    """verify(files) -> (exit code, {file: verdict}, text for people)"""

    def verify(*files):
        code = main(["verify", *map(str, files), "--json"])
        found = {each["file"]: each for each in json.loads(capsys.readouterr().out)["files"]}
        assert main(["verify", *map(str, files)]) == code
        return code, found, capsys.readouterr().out

    return verify


@pytest.fixture
def model(tmp_path) -> Path:
    return write(tmp_path / "x.safetensors")


def test_what_was_written_is_whole(run, model, tmp_path):
    statistics = fill(tmp_path / "s.safetensors").path
    code, found, text = run(model, statistics)
    assert code == 0 and not any(each["problems"] for each in found.values())
    assert found["x.safetensors"]["kind"] == "4-bit, native, generic" and found["s.safetensors"]["kind"] == "statistics"
    assert text.count("whole") == 2 and "checksums" not in text


@pytest.mark.parametrize("to", TARGETS)
def test_of_any_dialect_every_bad_tensor_is_named(run, tmp_path, to):
    """Also one that no reader reads, as smooth_orig."""
    source = save_model(tmp_path / "source.safetensors", stored_model("flux"))
    path = convert_file(source, tmp_path / "x.safetensors", to).path
    names = sorted(load_file(path))
    bad = [name for name in names if name.endswith(("smooth", "smooth_orig", "smooth_factor", "_scale", "wscales"))]
    for name in bad:
        edit(path, flipped(name))
    code, found, text = run(path)
    assert code == 1 and len(bad) > 4 and text.startswith("DAMAGED  x.safetensors: 4-bit")
    problems = found["x.safetensors"]["problems"]
    assert [f"tensor {name} is" in "\n".join(problems) for name in bad] == [True] * len(bad)
    assert len(problems) == len(bad) == text.count("is not what was written")


def test_what_is_gone_or_edited_is_listed_beside_damaged_tensors(run, model):
    edit(model, dropped("norm.weight"))
    edit(model, string("recipe", lambda text: "{}"))
    edit(model, flipped("blocks.1.proj.weight"))
    _, found, text = run(model)
    for what in ("tensor norm.weight is gone", "recipe in the header is not what", "blocks.1.proj.weight is not what"):
        assert what in text
    assert len(found["x.safetensors"]["problems"]) == 3


def test_a_file_without_checksums_is_said_to_be(run, model, tmp_path):
    other = tmp_path / "theirs.safetensors"
    save_file(load_file(model), other)
    wide = tmp_path / "wide.safetensors"
    save_file({"head.weight": torch.ones(4, 4).half(), "ids": torch.arange(3)}, wide)
    code, found, text = run(other, wide)
    assert code == 0 and found["wide.safetensors"]["kind"] == "16-bit"
    assert text.count("has no checksums: dtypes, shapes and finite values were checked") == 2 and "whole" not in text
    for path, name in ((other, "blocks.0.proj.smooth_factor"), (other, "norm.weight"), (wide, "head.weight")):
        edit(path, overwritten(name, NAN if path == other else b"\x01\x7e"))
    code, found, _ = run(other, wide)
    assert code == 1 and [len(each["problems"]) for each in found.values()] == [2, 1]
    assert "layer 'blocks.0.proj': smooth_factor holds NaN or Inf" in found["theirs.safetensors"]["problems"][0]


def test_an_unfinished_file_of_statistics_is_said_to_be(run, tmp_path):
    fill(tmp_path / "s.safetensors").begin()
    code, _, text = run(tmp_path / "s.safetensors")
    assert code == 0 and "unfinished" in text and "has no checksums" in text
    Statistics.open(tmp_path / "s.safetensors", writable=True).add_run(id="1")
    assert run(tmp_path / "s.safetensors")[2].startswith("whole")


def test_what_cannot_be_read_is_damaged_and_the_next_file_is_read(run, model, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.read_bytes()[:-1])
    code, found, text = run(cut, tmp_path / "gone.safetensors", model)
    assert code == 1 and "not a whole safetensors file" in text and "there is no such file" in text
    assert not found["x.safetensors"]["problems"]


def test_the_older_folder_of_two_files_is_one_model(run, tmp_path):
    single = save_model(tmp_path / "x.safetensors", stored_model("flux"), {"config": "{}", "comfy_config": "{}"})
    code, found, _ = run(legacy_folder(tmp_path / "folder", single))
    assert code == 0 and found["folder"]["kind"].startswith("4-bit, nunchaku")


def test_it_shows_how_far_it_is(model, capsys):
    assert main(["verify", str(model)]) == 0
    assert capsys.readouterr().err.endswith("x.safetensors" + " " * 47 + "\n")


def test_as_a_user_types_it(model):
    root = Path(__file__).resolve().parents[2]
    edit(model, flipped("head.weight"))
    command = [sys.executable, "-m", "quantize", "verify", os.fspath(model)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "tensor head.weight is not what was written" in done.stdout
