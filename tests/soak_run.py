"""One run of `make soak`: clients that send prompts at once, what is looked at, and the table of figures."""

import collections
import contextlib
import io
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from svdquant_pack.quantize.files.lifecycle import leftovers
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.tests import soak_jobs
from svdquant_pack.tests.host.server import ExecutionFailed, Host, HostError, PromptRefused, run_seconds
from svdquant_pack.tests.quantize.loopback_hub import serving
from svdquant_pack.tests.soak_jobs import Combination, Dealer, Job

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 4
WARM_UP = 0.2  # of the prompts, before memory and open files are first looked at
HANG_SECONDS = 60
MEMORY_BYTES = (
    64 << 20
)  # that the server may have more at the end; memory that was given back is not always the system's
OPEN_FILES = 4
DISK_BYTES = 1 << 20  # of the disk that is full: less than one 4-bit model
# what is raised on purpose; anything else is a defect, whatever its text
OURS = r".*\.(?:kernels|quantize|nodes)\..*Error"
TYPES = re.compile(rf"ValueError|OSError|(?:FileNotFound|FileExists|Permission)Error|Interrupted|{OURS}")
ASKED_FOR = r"output/soak_\d+_\.png|output/svdquant/soak_\d\.report/.*|server\.log|(temp|user)/.*"


@dataclass(frozen=True)
class Ending:
    """How one prompt ended: its seconds by the server's clock, the text of a refusal or failure, the failure's type."""

    job: Job
    seconds: float
    error: str = ""
    raised: str = ""
    pixels: bytes = b""
    sampled: bool = False  # not answered from the host's cache

    def miss(self, longest: float = HANG_SECONDS) -> str:
        """What is wrong with it, in a line, or nothing."""
        what = f"{self.job.kind}: {soak_jobs.pasted(self.job.graph)}"
        if self.seconds > longest:
            return f"took {self.seconds:.0f} s: {what}"
        if not self.error:
            return f"passed, which it must not: {what}" if self.job.must_fail else ""
        if self.raised and not TYPES.fullmatch(self.raised):
            return f"ended in {self.raised}: {self.error}: {what}"
        if self.job.interrupt is not None and self.raised == "Interrupted":
            return ""
        if not any(re.search(said, self.error, re.DOTALL) for said in self.job.said):
            return f"said {self.error!r}: {what}"
        return ""


@dataclass(frozen=True)
class Use:
    """What the server's process holds, idle, with every model unloaded; nothing where the system does not say."""

    memory: int
    files: tuple[str, ...]

    @classmethod
    def of(cls, host: Host) -> "Use":
        host.free_memory()
        time.sleep(3)  # it does so when it is next idle
        process = Path(f"/proc/{host.pid}")
        if not process.exists():
            return cls(0, ())
        (resident,) = re.findall(r"VmRSS:\s+(\d+) kB", (process / "status").read_text())
        return cls(int(resident) * 1024, tuple(sorted(opened_by(process))))


@dataclass
class Soak:
    """One run: its endings, and every line that says what was missed."""

    jobs: Sequence[Job]
    longest: float = HANG_SECONDS
    endings: list[Ending] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    pictures: int = 0  # compared
    combinations: int = 0

    def run(self, host: Host) -> None:
        """Every job, from CLIENTS threads; the first ones warm the server up."""
        first = max(1, int(len(self.jobs) * WARM_UP))
        for part in (self.jobs[:first], self.jobs[first:]):
            with ThreadPoolExecutor(CLIENTS) as clients:
                try:
                    for ending in clients.map(lambda job: end(host, job), part):
                        self.endings.append(ending)
                        self.note(ending.miss(self.longest))
                except BaseException:
                    clients.shutdown(cancel_futures=True)  # else Ctrl-C waits for every prompt
                    raise
            self.uses.append(Use.of(host))
        self.compare_use(*self.uses)

    def compare_use(self, before: Use, after: Use) -> None:
        if after.memory - before.memory > MEMORY_BYTES:
            self.note(f"memory went from {before.memory:,} to {after.memory:,} bytes")
        if len(after.files) - len(before.files) > OPEN_FILES:
            self.note(f"open files went from {before.files} to {after.files}")

    def note(self, line: str) -> None:
        if line:
            print(f"MISSED: {line}", flush=True)
            self.missed.append(line)

    def compare(self, host: Host) -> None:
        """Every picture with the one of a server that has done nothing else."""
        shown = [ending for ending in self.endings if ending.pixels and ending.job.pictures]
        truth: dict[Combination, bytes] = {}
        for combination in sorted({each for ending in shown for each in ending.job.pictures}, key=repr):
            truth[combination] = end(host, Job("fresh", soak_jobs.paint(combination))).pixels
            if not truth[combination]:
                self.note(f"a fresh server paints nothing for {combination}")
        for line in differences(shown, truth):
            self.note(line)
        self.pictures, self.combinations = sum(ending.sampled for ending in shown), len(truth)

    def look(self, root: Path, start: set[Path]) -> None:
        """At the files that are there now, and were not at the start; the server has ended."""
        base = root / "base"
        models, statistics = base / "models" / "diffusion_models", base / "output" / "svdquant"
        stopped = {Path(each.job.target).name for each in self.endings if each.error and each.job.target}
        hidden = leftovers(base)
        for each in hidden:
            if each.kind == "tmp" or each.name not in stopped:
                self.note(f"left behind without a kill: {each.path}")
        for folder in (models, statistics):
            command = [sys.executable, "-m", "quantize", "clean", str(folder)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for each in leftovers(base):
            self.note(f"still there after clean: {each.path}")
        targets = {models / name for name in (*soak_jobs.TARGETS, soak_jobs.DOWNLOADED)}
        for target in filter(Path.exists, targets):
            try:
                checkpoint = open_checkpoint(target)
                for name in checkpoint.specs:
                    checkpoint.layer(name)
            except ValueError as error:
                self.note(f"not whole: {error}")
        allowed = [*targets, *(statistics / f"{name}.statistics.safetensors" for name in soak_jobs.STATISTICS)]
        for path in sorted(files_of(root) - start - set(allowed)):
            if not asked_for(path.relative_to(base) if path.is_relative_to(base) else path):
                self.note(f"nobody asked for {path}")

    def report(self, seed: int, seconds: float) -> str:
        """The figures, and what kinds of prompts ended how."""
        kinds = collections.Counter(ending.job.kind for ending in self.endings)
        ends = collections.Counter((ending.job.kind, how(ending)) for ending in self.endings)
        lines = [f"{'prompts':16}{'number':>7}  how they ended"]
        for kind, number in sorted(kinds.items()):
            said = ", ".join(f"{count} {word}" for (of, word), count in sorted(ends.items()) if of == kind)
            lines.append(f"{kind:16}{number:7}  {said}")
        slowest = max((ending.seconds for ending in self.endings), default=0.0)
        before, after = (*self.uses, Use(0, ()), Use(0, ()))[:2]
        return "\n".join(
            [
                *lines,
                f"pictures        {self.pictures} of {self.combinations} combinations compared with a fresh server's",
                f"memory          {before.memory / 1e6:.0f} -> {after.memory / 1e6:.0f} MB "
                f"(at most {MEMORY_BYTES / 1e6:.0f} MB more)",
                f"open files      {len(before.files)} -> {len(after.files)} (at most {OPEN_FILES} more)",
                f"slowest prompt  {slowest:.1f} s (at most {self.longest:g} s)",
                f"seconds         {seconds:.0f}",
                f"commit          {commit()}",
                f"machine         {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
                f"seed            {seed}",
                f"missed          {len(self.missed)}",
            ]
        )


def how(ending: Ending) -> str:
    if not ending.error:
        return "passed"
    return ending.raised.rpartition(".")[2] or "refused"


def differences(shown: Sequence[Ending], truth: dict[Combination, bytes]) -> Iterator[str]:
    """A line for every picture that is none of those that its job may show, and by how much it is another one."""
    for ending in shown:
        wanted = {truth[each] for each in ending.job.pictures}
        if ending.pixels not in wanted:
            off = [
                f"{count} values by up to {most} of 255"
                for count, most in (distance(ending.pixels, one) for one in wanted)
            ]
            yield f"another picture than a fresh server's: {ending.job.kind}: {', '.join(off)}: {ending.job.pictures}"


def distance(one: bytes, other: bytes) -> tuple[int, int]:
    """(values that differ, the largest difference) of two sets of pictures; of other sizes all of them do."""
    if len(one) != len(other):
        return max(len(one), len(other)), 255
    apart = np.abs(np.frombuffer(one, np.uint8).astype(int) - np.frombuffer(other, np.uint8))
    return int((apart > 0).sum()), int(apart.max(initial=0))


def asked_for(path: Path) -> bool:
    """Whether a file below the base folder is one that ComfyUI or a prompt was told to write."""
    text = path.as_posix()
    return bool(
        re.fullmatch(r"output/soak_\d+_\.png|output/svdquant/soak_\d\.report/.*|server\.log|(temp|user)/.*", text)
    )


def opened_by(process: Path) -> Iterator[str]:
    """What a process has open, by the names in /proc."""
    for entry in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            yield str(entry.readlink())


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "not a checkout"


def end(host: Host, job: Job) -> Ending:
    """Send one prompt, do to it what the job says, and wait for its end."""
    try:
        if job.fault is not None:
            job.fault(host)
        prompt = host.queue(job.graph)
    except PromptRefused as error:
        return Ending(job, 0.0, str(error))
    except (HostError, OSError) as error:
        return Ending(job, 0.0, str(error), "no answer")
    if job.interrupt is not None:
        threading.Thread(target=interrupt, args=(host, prompt, job.interrupt), daemon=True).start()
    found: dict[str, Any] = {}
    try:
        entry = host.wait(prompt, HANG_SECONDS * (CLIENTS + 1))  # those of the others may be before it
    except ExecutionFailed as error:
        entry, found = host.entry(prompt) or {}, {"error": error.message, "raised": error.exception_type}
    except (HostError, OSError) as error:
        return Ending(job, 0.0, str(error), "no answer")
    if "sampler" in job.graph and not found:
        said = entry["status"]["messages"]
        cached = {name for kind, message in said if kind == "execution_cached" for name in message["nodes"]}
        found = {"pixels": pixels_of(host.images(entry["outputs"])), "sampled": "sampler" not in cached}
    return Ending(job, run_seconds(entry), **found)


def interrupt(host: Host, prompt: str, after: float) -> None:
    """Stop a prompt so many seconds after its start, if it still runs then."""
    with contextlib.suppress(OSError, HostError):
        while not host.runs(prompt):
            if host.entry(prompt) is not None:
                return
            time.sleep(0.02)
        time.sleep(after)
        host.interrupt(prompt)


def pixels_of(pngs: Sequence[bytes]) -> bytes:
    """The pixels alone: the files also hold the workflow."""
    return b"".join(np.asarray(Image.open(io.BytesIO(png))).tobytes() for png in pngs)


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[str]:
    """A folder on a disk of DISK_BYTES, where one can be mounted; else nothing larger than that can be written at all.

    Gives a word for which of both it is.
    """
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "soak", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield "a disk of 1 MB" if mounted else ""
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def soak(comfyui: Path, count: int, seed: int, longest: float = HANG_SECONDS) -> int:
    """Everything; returns the exit status."""
    begun = time.monotonic()
    print(f"seed {seed}, {count} prompts from {CLIENTS} clients", flush=True)
    dealer = Dealer(random.Random(seed))
    run = Soak(dealer.deal(count), longest)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="svdquant-soak-"))).resolve()
        (root / "files").mkdir()
        models = soak_jobs.make_files(root / "files")
        served = (root / "files" / "int4_nunchaku.safetensors").read_bytes()
        base = root / "base"
        disk = stack.enter_context(full_disk(base / "models" / "diffusion_models" / soak_jobs.SMALL))
        if not disk:
            print("no disk can be mounted here: no prompt finds a full one", flush=True)
            run.jobs = [job for job in run.jobs if job.kind != "full disk"]
        address = stack.enter_context(serving(served))
        stack.enter_context(mock.patch.dict(os.environ, HF_ENDPOINT=address, HF_HUB_DISABLE_TELEMETRY="1"))
        start: set[Path] = set()
        try:
            with Host(comfyui, ROOT, models=models, base=base) as host:
                start = files_of(root)
                run.run(host)
            with Host(comfyui, ROOT, models=models) as fresh:
                run.compare(fresh)
            run.look(root, start)
        except (HostError, OSError) as error:
            run.note(f"{type(error).__name__}: {error}")
    print(run.report(seed, time.monotonic() - begun), flush=True)
    return 1 if run.missed else 0
