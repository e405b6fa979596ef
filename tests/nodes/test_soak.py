"""The soak that `make soak` is a long run of: its checks see what they are for, and a short run of it is clean."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from svdquant_pack.tests.soak_jobs import Combination, Job, paint
from svdquant_pack.tests.soak_run import Ending, Soak, Use, asked_for, differences

ROOT = Path(__file__).resolve().parents[2]
SHOWN, OTHER = (Combination("model", (), "auto", seed) for seed in (0, 1))
PAINT = Job("paint", paint(SHOWN), (SHOWN,), said=("is not in models",))


@pytest.mark.parametrize(
    ("ending", "miss"),
    [
        (Ending(PAINT, 1.0, pixels=b"a"), ""),
        (Ending(PAINT, 61.0, pixels=b"a"), "took 61 s"),
        (Ending(PAINT, 1.0, "x is not in models/diffusion_models"), ""),
        (Ending(PAINT, 1.0, "something else"), "said 'something else'"),
        (Ending(PAINT, 1.0, "x is not in models", "KeyError"), "ended in KeyError"),
        (Ending(PAINT, 1.0, "x is not in models", "torch.linalg.LinAlgError"), "ended in torch.linalg.LinAlgError"),
        (Ending(PAINT, 0.0, "the server is gone", "no answer"), "ended in no answer"),
        (Ending(PAINT, 1.0, "the run was stopped", "Interrupted"), "said"),
        (Ending(Job("x", {}, interrupt=0.5), 1.0, "the run was stopped", "Interrupted"), ""),
        (Ending(Job("x", {}, said=(".",), must_fail=True), 1.0), "passed, which it must not"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_seen(ending, miss):
    found = ending.miss()
    assert miss in found if miss else not found


def test_a_picture_that_is_not_the_fresh_servers_is_seen():
    truth = {SHOWN: b"a", OTHER: b"b"}
    assert not list(differences([Ending(PAINT, 1.0, pixels=b"a")], truth))
    (line,) = differences([Ending(PAINT, 1.0, pixels=b"b")], truth)
    assert "1 values by up to 1 of 255" in line
    assert not list(differences([Ending(Job("swapped", {}, (SHOWN, OTHER)), 1.0, pixels=b"b")], truth))


def test_memory_and_open_files_that_grow_are_seen():
    for before, after, misses in (
        (Use(1 << 30, ("a",)), Use((1 << 30) + (63 << 20), ("a",)), 0),
        (Use(1 << 30, ("a",)), Use((1 << 30) + (65 << 20), ("a",)), 1),
        (Use(1 << 30, ("a",)), Use(1 << 30, ("a",) * 6), 1),
    ):
        run = Soak([])
        run.compare_use(before, after)
        assert len(run.missed) == misses


def test_files_that_are_left_behind_are_seen(tmp_path):
    models = tmp_path / "base" / "models" / "diffusion_models"
    models.mkdir(parents=True)
    (tmp_path / "base" / "output" / "svdquant").mkdir(parents=True)
    for name in (".soak_0.safetensors.12345678-999999999-1.tmp", "escaped.safetensors", "soak_1.safetensors"):
        (models / name).write_bytes(b"x")
    (tmp_path / "above").write_bytes(b"x")
    run = Soak([])
    run.look(tmp_path, set())
    text = "\n".join(run.missed)
    assert "left behind without a kill" in text and "not whole: soak_1.safetensors" in text
    assert "nobody asked for" in text and "escaped" in text and "above" in text


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("output/soak_00001_.png", True),
        ("output/svdquant/soak_0.report/report.json", True),
        ("server.log", True),
        ("output/evil.safetensors", False),
        ("models/diffusion_models/evil.safetensors", False),
    ],
)
def test_files_that_somebody_asked_for(path, asked):
    assert asked_for(Path(path)) is asked


@pytest.mark.host
def test_a_short_soak_is_clean():
    command = [sys.executable, "tests/soak.py", "--prompts", "20", "--seed", "1", "--longest", "300"]
    done = subprocess.run([*command, "--comfyui", os.environ["COMFYUI_PATH"]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "missed          0" in done.stdout, done.stdout + done.stderr
