"""Files that are not finished or were left behind: what they are called, whose they are, and when they may go.

    .NAME.OWNER.tmp           being written; gets the name NAME when it is whole
    .NAME.KEY.OWNER.partial   a download of the content KEY; whoever fetches that next takes it up
    .NAME.work                a folder of finished layers; holds OWNER.owner while a run uses it

OWNER is MACHINE-PID-START, a process: the same number that started at another time is another process. What a dead
process left is removed when the same NAME is written again; a partial file and a work folder are worth something, so
they stay until they are taken up, or until `clean`. On a shared disk nobody can tell whether a process of another
machine lives: what that left is listed, and removed only where it is asked for.
"""

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

LONGEST_PART = 255  # bytes of one name, on every file system that models are kept on
ROOM_FOR_OWNER = 96  # ... of which a hidden name needs these for key, owner and suffix
DISK_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
WINDOWS = os.name == "nt"


@dataclass(frozen=True)
class Owner:
    """A process: 8 hex digits of its machine's name, its number, and when it started (0 where that is not known)."""

    machine: str
    pid: int
    start: int

    def __str__(self) -> str:
        return f"{self.machine}-{self.pid}-{self.start}"

    @classmethod
    def this(cls) -> "Owner":
        return cls(_machine(), os.getpid(), _started(os.getpid()) or 0)

    @classmethod
    def parse(cls, text: str) -> "Owner":
        machine, pid, start = text.split("-")
        return cls(machine, int(pid), int(start))

    @property
    def is_here(self) -> bool:
        return self.machine == _machine()

    @property
    def lives(self) -> bool:
        """Whether it may still run; of another machine nobody knows."""
        if not self.is_here:
            return True
        started = _started(self.pid)
        return started is not None and (0 in (started, self.start) or started == self.start)


@cache
def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _started(pid: int) -> int | None:
    """When a process started, in a unit of the system's own; 0 if it runs and that is not known, None if it is gone."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # gone, or another user's on a system that hides those
            return _answers(pid)
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    if pid == os.getpid():
        return 0
    if WINDOWS:  # os.kill would end it, whatever the signal; and what it has open resists `Leftover.remove`
        return None
    return _answers(pid)


def _answers(pid: int) -> int | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return 0
    return 0


OWNER = r"(?P<owner>[0-9a-f]{8}-\d+-\d+)"
TEMPORARY = re.compile(rf"\.(?P<name>.+)\.{OWNER}\.tmp", re.DOTALL)
PARTIAL = re.compile(rf"\.(?P<name>.+)\.(?P<key>[0-9a-f]{{12}})\.{OWNER}\.partial", re.DOTALL)
OLD_TEMPORARY = re.compile(r"\.(?P<name>.+\.safetensors)\.(?P<pid>\d+)\.tmp", re.DOTALL)  # of earlier versions
OLD_PARTIAL = re.compile(r"(?P<name>.+\.(?:safetensors|json))\.(?P<key>[0-9a-f]{12})\.partial", re.DOTALL)
WORK = re.compile(r"\.(?P<name>.+)\.work", re.DOTALL)
IN_WORK = re.compile(rf"[0-9a-f]{{64}}\.safetensors|{OWNER}\.owner|\.[0-9a-f]{{64}}\.safetensors\..+\.tmp", re.DOTALL)


@dataclass(frozen=True)
class Leftover:
    """A hidden file or folder of the pack.

    name   of the file that it was to become, shortened where that is long
    kind   tmp, partial or work
    key    of a partial file: first digits of the hub's name for its content
    owner  None where it names none
    """

    path: Path
    name: str
    kind: str
    key: str = ""
    owner: Owner | None = None

    @property
    def in_use(self) -> bool:
        return self.owner is not None and self.owner.lives

    @property
    def elsewhere(self) -> bool:
        """Whether its process is one of another machine."""
        return self.owner is not None and not self.owner.is_here

    @property
    def size(self) -> int:
        """Bytes; 0 for what is gone meanwhile."""
        found = self.path.rglob("*") if self.path.is_dir() else [self.path]
        total = 0
        for path in found:
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total

    def remove(self) -> bool:
        """Whether it is gone; what cannot be removed stays for the next time."""
        with contextlib.suppress(OSError):
            if self.path.is_dir():
                for mark in self.path.glob("*.owner"):
                    mark.unlink(missing_ok=True)  # first: on Windows it resists while its process lives
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)
        return not self.path.exists()


def _short(name: str) -> str:
    """The name inside a hidden name: itself, or its start and a hash where both together were too long to be a name."""
    data = name.encode(errors="surrogateescape")
    if len(data) <= LONGEST_PART - ROOM_FOR_OWNER:
        return name
    start = data[: LONGEST_PART - ROOM_FOR_OWNER - 10].decode(errors="ignore")
    return f"{start}~{hashlib.sha256(data).hexdigest()[:8]}"


def temporary_for(path: Path) -> Path:
    """The hidden file that becomes `path` when it is whole; what dead processes left of earlier ones is removed."""
    for found in beside(path):
        if found.kind == "tmp" and not found.in_use:
            found.remove()
    return path.with_name(f".{_short(path.name)}.{Owner.this()}.tmp")


def write_whole(path: Path, data: bytes) -> Path:
    """A small file, all of it or as it was before."""
    temporary = temporary_for(path)
    try:
        temporary.write_bytes(data)
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def reserve(stream: BinaryIO, size: int) -> None:
    """Take the room for `size` bytes of a new file from the disk now, not when it is full; OSError if there is none.

    Does nothing where the system has no way to do it.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
                raise


@contextlib.contextmanager
def naming_a_full_disk(path: Path, also: str = "") -> Iterator[None]:
    """A full disk in the body becomes an OSError that says what was written where, what to do, and `also`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = f"while {path.name} was written to {path.parent}"
        raise OSError(error.errno, f"{error.strerror} {where}: make room there and run again{also}") from error


def partial_for(path: Path, key: str) -> Path:
    """The hidden file for the download of `key` to `path`: that of a dead process, taken over, or a new name.

    Parts of another content, which nobody can continue, are removed.
    """
    mine = path.with_name(f".{_short(path.name)}.{key}.{Owner.this()}.partial")
    for found in beside(path):
        if found.kind != "partial" or found.path == mine or found.in_use:
            continue
        if found.key == key and not mine.exists():
            with contextlib.suppress(OSError):  # on Windows another process has it open
                found.path.replace(mine)
        else:
            found.remove()
    return mine


def work_for(path: Path) -> Path:
    """The hidden folder for finished layers of `path`."""
    return path.with_name(f".{_short(path.name)}.work")


def beside(path: Path) -> list[Leftover]:
    """What is there, finished or not, on the way to the file `path`."""
    if not path.parent.is_dir():
        return []
    name = _short(path.name)
    found = (_leftover(each) for each in path.parent.iterdir())
    return [one for one in found if one is not None and one.name in (name, path.name)]


def leftovers(folder: str | Path) -> list[Leftover]:
    """Everything unfinished in a folder and the folders in it, in use or not; links are not followed."""
    return sorted(_walk(Path(folder)), key=lambda found: found.path)


def _walk(folder: Path) -> Iterator[Leftover]:
    for top, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            found = _leftover(Path(top, name))
            if found is not None:
                yield found
                if name in folders:
                    folders.remove(name)


def clean(folder: str | Path, dry_run: bool = False, other_machines: bool = False) -> list[Leftover]:
    """Remove what no process uses; returns what was removed, or would be.

    other_machines  also what a process of another machine left, alive or not
    """
    found = [each for each in leftovers(folder) if not each.in_use or (other_machines and each.elsewhere)]
    return found if dry_run else [each for each in found if each.remove()]


def _leftover(path: Path) -> Leftover | None:
    """What a file or folder is to the pack by its name; a work folder also by what is in it."""
    name = path.name
    if path.is_dir():
        match = WORK.fullmatch(name)
        return _work(path, match["name"]) if match and not path.is_symlink() else None
    for kind, pattern in (("tmp", TEMPORARY), ("partial", PARTIAL), ("tmp", OLD_TEMPORARY), ("partial", OLD_PARTIAL)):
        if match := pattern.fullmatch(name):
            parts = match.groupdict()
            owner = Owner.parse(parts["owner"]) if "owner" in parts else None
            if "pid" in parts:
                owner = Owner(_machine(), int(parts["pid"]), 0)
            return Leftover(path, parts["name"], kind, parts.get("key") or "", owner)
    return None


def _work(path: Path, name: str) -> Leftover | None:
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError:
        return None
    if not all(IN_WORK.fullmatch(entry) for entry in names):
        return None  # somebody else's folder
    owners = sorted(users(path), key=lambda owner: (owner.is_here and owner.lives, owner.lives))
    return Leftover(path, name, "work", owner=owners[-1] if owners else None)


def users(work: Path) -> list[Owner]:
    """The processes that say in a work folder that they use it, alive or not."""
    marks = (path.name.removesuffix(".owner") for path in work.glob("*.owner"))
    return [Owner.parse(mark) for mark in marks if re.fullmatch(OWNER, mark)]
