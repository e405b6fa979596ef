"""Killed in the middle: whole files, work that is taken up, and nothing left behind once the run is done again."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.files.hub import HubFile, download
from svdquant_pack.quantize.files.lifecycle import leftovers, users
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.maker.model import Target, quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.quantize.loopback_hub import CONTENT, Hub, serving

ROOT = Path(__file__).resolve().parents[2]
OLD = b"an older file"
LAYERS, SIZE = 12, 512

# what a child runs, with the pack as the tests have it; it waits at the place that the parent names
CHILD = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("conftest", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.hub import HubFile, download
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.maker.model import Target, quantize_model
from svdquant_pack.quantize.recipe import Recipe
from pathlib import Path
job, source, target, stop_at = sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5])
calls = 0
def progress(*_):
    global calls
    calls += 1
    if calls > stop_at:
        print("here", flush=True)
        time.sleep(600)
if job == "quantize":
    quantize_model(FileSource(source), Target(target, True), Recipe(rank=16, alternations=1), progress)
elif job == "convert":
    convert_file(source, target, "kitchen", progress=progress)
else:
    download(HubFile("owner/name", target.name), target.parent, True, progress, source)
"""


def start(job: str, source: str | Path, target: Path, stop_at: int) -> subprocess.Popen:
    """A child that waits after so many reports of its progress."""
    command = [sys.executable, "-c", CHILD, str(ROOT / "tests" / "conftest.py"), job, str(source), str(target)]
    child = subprocess.Popen([*command, str(stop_at)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "here\n"
    return child


def kill(child: subprocess.Popen) -> None:
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


def command(*arguments: object) -> str:
    done = subprocess.run([sys.executable, "-m", "quantize", *map(str, arguments)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("kills") / "model.safetensors"
    save_file(
        {f"blocks.{i}.proj.weight": torch.randn(SIZE, SIZE, generator=generator).half() for i in range(LAYERS)}, path
    )
    return path


@pytest.fixture(scope="module")
def whole(source) -> Path:
    """What an undisturbed run writes."""
    path = source.with_name("whole.safetensors")
    quantize_model(FileSource(source), path, Recipe(rank=16, alternations=1))
    return path


@pytest.mark.parametrize("stop_at", [0, 1, LAYERS - 1])
def test_a_killed_quantize_is_resumed_and_leaves_nothing(source, whole, tmp_path, stop_at):
    target = tmp_path / "out.safetensors"
    target.write_bytes(OLD)
    child = start("quantize", source, target, stop_at)
    work = tmp_path / ".out.safetensors.work"
    assert [user.pid for user in users(work)] == ([child.pid] if stop_at else [])
    kill(child)
    assert target.read_bytes() == OLD and leftovers(tmp_path) and not any(each.in_use for each in leftovers(tmp_path))
    report = quantize_model(FileSource(source), Target(target, True), Recipe(rank=16, alternations=1))
    assert report.resumed == stop_at and target.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_killed_quantize_leaves_nothing_when_it_is_done_without_resume(source, whole, tmp_path):
    target = tmp_path / "out.safetensors"
    kill(start("quantize", source, target, 3))
    assert {each.kind for each in leftovers(tmp_path)} == {"tmp", "work"}
    quantize_model(FileSource(source), target, Recipe(rank=16, alternations=1))
    assert target.read_bytes() == whole.read_bytes() and [path.name for path in tmp_path.iterdir()] == [target.name]


def test_two_processes_do_not_share_a_work_folder(source, tmp_path):
    target = tmp_path / "out.safetensors"
    child = start("quantize", source, target, 2)
    try:
        with pytest.raises(OSError, match=f"process {child.pid} is writing the same file"):
            quantize_model(FileSource(source), Target(target, True), Recipe(rank=16, alternations=1))
        assert "removed 0 leftovers" in command("clean", tmp_path) and len(leftovers(tmp_path)) == 2
    finally:
        kill(child)
    assert len(list((tmp_path / ".out.safetensors.work").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("stop_at", [0, LAYERS // 2])
def test_a_killed_convert_leaves_nothing_when_it_is_done_again(whole, tmp_path, stop_at):
    target = tmp_path / "out.safetensors"
    target.write_bytes(OLD)
    kill(start("convert", whole, target, stop_at))
    assert target.read_bytes() == OLD and [each.kind for each in leftovers(tmp_path)] == ["tmp"]
    command("convert", whole, target, "--to", "kitchen", "--overwrite")
    assert len(load_file(target)) >= LAYERS and [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_killed_download_is_continued_and_leaves_nothing(tmp_path, stop_at):
    target = tmp_path / "model.safetensors"
    target.write_bytes(OLD)
    with serving() as endpoint:
        kill(start("download", endpoint, target, stop_at))
        (partial,) = leftovers(tmp_path)
        assert (
            target.read_bytes() == OLD and partial.kind == "partial" and CONTENT.startswith(partial.path.read_bytes())
        )
        had = partial.size
        Hub.ranges.clear()
        download(HubFile("owner/name", target.name), tmp_path, True, endpoint=endpoint)
    asked = [int(range.removeprefix("bytes=").partition("-")[0]) for range in Hub.ranges if range]
    assert had and asked[:1] == ([had] if had < len(CONTENT) else []) and target.read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_clean_lists_and_removes_what_killed_runs_left(source, tmp_path):
    kill(start("quantize", source, tmp_path / "out.safetensors", 3))
    (tmp_path / "mine.safetensors").write_bytes(OLD)
    sizes = {each.path.name: each.size for each in leftovers(tmp_path)}
    listed = command("clean", tmp_path, "--dry-run")
    for name, size in sizes.items():
        assert re.search(rf"would remove +{size:,} bytes +{re.escape(str(tmp_path / name))} \(", listed), listed
    assert f"would remove 2 leftovers, {sum(sizes.values()):,} bytes" in listed and len(leftovers(tmp_path)) == 2
    assert "removed 2 leftovers" in command("clean", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]
