"""Killed in the middle: whole files, work that is taken up, and nothing left behind once the run is done again.

At chosen places of a run first, then at random instants: SVDQUANT_KILLS of them with those of
tests/nodes/test_server_kills.py (`make kills`: 50).
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

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
KILLS = int(os.environ.get("SVDQUANT_KILLS", "10"))  # at random instants

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
print("ready", flush=True)
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


def share(of_fifty: int) -> int:
    """How many kills of one kind; one at least."""
    return max(1, of_fifty * KILLS // 50)


def start(job: str, source: str | Path, target: Path, stop_at: int | None) -> subprocess.Popen:
    """A child that waits after so many reports of its progress, or never; returned when it has come there."""
    command = [sys.executable, "-c", CHILD, str(ROOT / "tests" / "conftest.py"), job, str(source), str(target)]
    child = subprocess.Popen(
        [*command, str(1 << 30 if stop_at is None else stop_at)], stdout=subprocess.PIPE, text=True
    )
    for said in ["ready\n"] if stop_at is None else ["ready\n", "here\n"]:
        assert child.stdout is not None and child.stdout.readline() == said
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


class Instants:
    """Random instants of a run: as long after its start as a run that is left alone takes at most."""

    def __init__(self, job: str, source: str | Path, target: Path) -> None:
        self._random, self._job, self._source, self._target = Random(job), job, source, target
        begun, child = time.monotonic(), start(job, source, target, None)
        ready = time.monotonic()
        child.wait()
        self.seconds, self._starting = time.monotonic() - ready, ready - begun
        self.content = target.read_bytes()
        assert child.returncode == 0 and [path.name for path in target.parent.iterdir()] == [target.name]

    def kill_some(self, most: int) -> int:
        """Kill one to three runs, one after the other, at most `most`; returns how many."""
        count = min(most, self._random.choice([1, 1, 2, 3]))
        for _ in range(count):
            child = start(self._job, self._source, self._target, None)
            late = self._random.random() < 0.5
            while late and child.poll() is None and not leftovers(self._target.parent):
                time.sleep(0.001)  # half of them while something is being written
            time.sleep(self._random.random() * self.seconds / (4 if late else 1))
            kill(child)
            assert self._target.read_bytes() in (OLD, self.content)
            assert not any(each.in_use for each in leftovers(self._target.parent))
        return count


@pytest.mark.parametrize(("job", "of_fifty"), [("quantize", 16), ("convert", 8), ("download", 8)])
def test_killed_at_any_instant_it_is_done_again_and_leaves_nothing(
    source, whole, tmp_path, record_property, job, of_fifty
):
    target, recipe = tmp_path / "model.safetensors", Recipe(rank=16, alternations=1)
    with serving() as endpoint:
        read = {"quantize": source, "convert": whole, "download": endpoint}[job]
        instants = Instants(job, read, target)
        kills, seen, total = 0, {"resumed": 0, "partial": 0, "whole": 0}, share(of_fifty)
        while kills < total:
            target.write_bytes(OLD)
            kills += instants.kill_some(total - kills)
            had = {each.kind: each for each in leftovers(tmp_path)}
            seen["whole"] += target.read_bytes() != OLD
            seen["partial"] += "partial" in had
            if job == "quantize":
                kept = len(list(had["work"].path.glob("[!.]*.safetensors"))) if "work" in had else 0
                report = quantize_model(FileSource(source), Target(target, True), recipe)
                assert report.resumed == kept, "what was finished was made again, or something else was taken up"
                seen["resumed"] += kept
            elif job == "convert":
                command("convert", whole, target, "--to", "kitchen", "--overwrite")
            else:
                Hub.ranges.clear()
                download(HubFile("owner/name", target.name), tmp_path, True, endpoint=endpoint)
                first = int((Hub.ranges or ["bytes=0-"])[0].removeprefix("bytes=").partition("-")[0])
                assert first == (had["partial"].size if "partial" in had and Hub.ranges else 0)
            assert target.read_bytes() == instants.content
            assert [path.name for path in tmp_path.iterdir()] == [target.name]
    said = ", ".join(f"{count} {what}" for what, count in seen.items())
    record_property("figures", f"{job}: {kills} kills within {instants.seconds:.2f} s each; {said}")
