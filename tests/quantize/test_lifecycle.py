"""What is not finished names its process, is listed, and goes when that is dead and nobody can use it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from svdquant_pack.quantize.files import lifecycle
from svdquant_pack.quantize.files.lifecycle import (
    Owner,
    beside,
    clean,
    leftovers,
    partial_for,
    temporary_for,
    work_for,
)

KEY, OTHER_KEY = "0123456789ab", "ba9876543210"


@pytest.fixture(scope="module")
def dead() -> Owner:
    """A process that was."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner(Owner.this().machine, child.pid, lifecycle._started(child.pid) or 0)
    assert owner.lives
    child.communicate(b"\n")
    return owner


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


def write(path: Path, size: int = 100) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def tmp_of(target: Path, owner: Owner) -> Path:
    return write(target.with_name(f".{target.name}.{owner}.tmp"))


def part_of(target: Path, owner: Owner, key: str = KEY) -> Path:
    return write(target.with_name(f".{target.name}.{key}.{owner}.partial"))


def work_of(target: Path, owner: Owner | None) -> Path:
    folder = work_for(target)
    write(folder / f"{'a' * 64}.safetensors")
    if owner is not None:
        write(folder / f"{owner}.owner", 0)
    return folder


def test_a_process_lives_until_it_is_gone(dead):
    this = Owner.this()
    assert this.lives and this.is_here and Owner.parse(str(this)) == this
    assert not dead.lives, "its number is free"
    assert not Owner(this.machine, this.pid, this.start + 1).lives, "the number is another process's"
    assert Owner(this.machine, this.pid, 0).lives, "when it started was not known"
    assert Owner("0" * 8, dead.pid, dead.start).lives, "nobody can tell from here"


def test_without_proc_the_system_is_asked_by_other_means(dead, monkeypatch):
    monkeypatch.setattr(lifecycle, "Path", lambda *_: Path("/nothing/there"))
    assert Owner.this() == Owner(dead.machine, os.getpid(), 0) and Owner.this().lives
    assert Owner(dead.machine, os.getppid(), 7).lives and not dead.lives
    monkeypatch.setattr(lifecycle, "WINDOWS", True)
    monkeypatch.setattr(lifecycle.os, "kill", lambda *_: pytest.fail("that ends the process on Windows"))
    assert Owner.this().lives and not dead.lives


def test_a_zombie_is_dead():
    child = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not Owner(Owner.this().machine, child.pid, 0).lives
    child.wait()


def test_a_new_temporary_file_takes_the_place_of_dead_ones(target, dead):
    other = tmp_of(target.with_name("other.safetensors"), dead)
    elsewhere = tmp_of(target, Owner("0" * 8, 1, 1))
    tmp_of(target, dead)
    old = write(target.with_name(f".{target.name}.{dead.pid}.tmp"))  # of an earlier version
    made = temporary_for(target)
    assert made.name == f".{target.name}.{Owner.this()}.tmp" and not old.exists()
    assert {path.name for path in target.parent.iterdir()} == {other.name, elsewhere.name}
    made.touch()
    assert temporary_for(target) == made and made.exists(), "what is in use stays"


def test_a_partial_file_of_a_dead_process_is_taken_over(target, dead):
    part_of(target, dead)
    other = part_of(target, dead, OTHER_KEY)
    mine = partial_for(target, KEY)
    assert mine.stat().st_size == 100 and not other.exists(), "nobody can continue another content"
    assert partial_for(target, KEY) == mine and [path.name for path in target.parent.iterdir()] == [mine.name]


def test_a_partial_file_of_an_earlier_version_is_taken_over(target):
    write(target.with_name(f"{target.name}.{KEY}.partial"))
    assert partial_for(target, KEY).stat().st_size == 100


def test_leftovers_are_listed_with_sizes_and_removed(tmp_path, target, dead):
    deep = tmp_path / "sub" / "other.safetensors"
    mine = [write(target), write(deep)]
    used = [tmp_of(target, Owner.this()), part_of(target, Owner.this()), work_of(target, Owner.this())]
    left = [tmp_of(deep, dead), part_of(deep, dead, OTHER_KEY), work_of(deep, dead)]
    foreign = tmp_of(deep, Owner("0" * 8, 1, 1))
    found = leftovers(tmp_path)
    assert {each.path for each in found} == {*used, *left, foreign} and {each.size for each in found} == {100}
    assert {each.path for each in found if each.in_use} == {*used, foreign}
    assert {each.path for each in clean(tmp_path, dry_run=True)} == set(left) and all(path.exists() for path in left)
    assert {each.path for each in clean(tmp_path)} == set(left) and not any(path.exists() for path in left)
    assert all(path.exists() for path in [*mine, *used, foreign])
    assert [each.path for each in clean(tmp_path, other_machines=True)] == [foreign]


def test_what_is_not_ours_is_not_touched(tmp_path):
    work = tmp_path / ".project.work"
    names = [".x.tmp", ".x.123.tmp", "x.partial", ".x.safetensors.tmp", "model.safetensors.part", ".x.1-2-3.tmp"]
    files = [write(tmp_path / name) for name in names] + [write(work / "thesis.txt")]
    assert clean(tmp_path) == [] and all(path.exists() for path in files)


def test_links_are_not_followed(tmp_path, dead):
    outside, folder = tmp_path / "outside", tmp_path / "models"
    left = tmp_of(write(outside / "x.safetensors"), dead)
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / ".y.work").symlink_to(outside)
    assert clean(folder) == [] and left.exists()


@pytest.mark.parametrize("name", ["m" * 243 + ".safetensors", "模" * 80 + ".safetensors"])
def test_the_longest_names_have_room_for_their_owner(tmp_path, dead, name):
    target = tmp_path / name
    for path in (temporary_for(target), partial_for(target, KEY), work_for(target)):
        write(path) if path.suffix != ".work" else path.mkdir()
    assert len(leftovers(tmp_path)) == len(beside(target)) == 3
    assert not beside(target.with_name("n" + name[1:])), "another name of that length is another file"
