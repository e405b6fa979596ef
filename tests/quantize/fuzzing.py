"""Runs a fuzz test: so many inputs, each within its time and memory, and what came of them.

SVDQUANT_FUZZ       inputs in all, over every test that fuzzes (2,000 in CI, `make fuzz`: 50,000)
SVDQUANT_FUZZ_SEED  of every choice; the same seed gives the same inputs
SVDQUANT_FUZZ_ONLY  the number of one input, to run it alone
"""

import contextlib
import io
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from svdquant_pack.nodes.remote import add_commands
from svdquant_pack.quantize.cli.main import main

USUAL_COUNT = 2000
COUNT = int(os.environ.get("SVDQUANT_FUZZ", USUAL_COUNT))
SEED = os.environ.get("SVDQUANT_FUZZ_SEED", "0")
ONLY = os.environ.get("SVDQUANT_FUZZ_ONLY")
LONGEST = 5.0  # seconds of CPU for one input
STUCK = 120.0  # seconds by the clock after which the process is ended: code that does not come back to Python
ROOM = 64 << 20  # bytes above twice the file
MOST_FAILURES = 20
STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Hang(BaseException):
    """An input took too long. No handler of errors catches it."""


class Watch:
    """with Watch("the input", size): ...; raises Hang after LONGEST seconds of CPU, AssertionError for memory."""

    def __init__(self, what: str, size: int) -> None:
        self.what, self.most = what, 2 * size + ROOM

    def __enter__(self) -> "Watch":
        self._timer = threading.Timer(STUCK, self._give_up)
        self._timer.daemon = True
        self._timer.start()
        if hasattr(signal, "setitimer"):
            self._handler = signal.signal(signal.SIGPROF, self._too_long)
            signal.setitimer(signal.ITIMER_PROF, LONGEST)
        self._start = _resident("VmRSS")
        with contextlib.suppress(OSError):
            PEAK.write_text("5")  # the peak starts anew
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._timer.cancel()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, self._handler)
        taken = _resident("VmHWM") - self._start
        if kind is None:
            assert taken <= self.most, f"took {taken:,} bytes of memory, at most {self.most:,} are right"

    def _too_long(self, *_: object) -> None:
        raise Hang(f"ran for more than {LONGEST:g} s of CPU time")

    def _give_up(self) -> None:
        sys.__stderr__.write(f"{self.what}: no end after {STUCK:g} s\n")
        sys.__stderr__.flush()
        os._exit(70)


def _resident(key: str) -> int:
    """Bytes; 0 where the system does not say."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


Check = Callable[[Random], tuple[str, list[str]]]
"""check(rng) -> (what came of one input, [kind of damage of where]); raises for what must not be"""


def fuzz(subject: str, share: int, check: Check, size: int = 0) -> str:
    """Run a subject's share of all inputs; returns the counts in words. Fails with the first inputs that are wrong."""
    inputs = range(max(1, share * COUNT // USUAL_COUNT)) if ONLY is None else [int(ONLY)]
    outcomes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    failures, slowest = [], 0.0
    logging.disable(logging.CRITICAL)  # its lines would stand between those of a command
    for index in inputs:
        what = f"{subject}, input {index} of seed {SEED}"
        begun = time.process_time()
        try:
            with Watch(what, size):
                outcome, done = check(Random(f"{SEED}/{subject}/{index}"))
            kinds.update(each.partition(" of ")[0] for each in done)
        except (Exception, Hang) as error:
            outcome = "WRONG"
            failures.append(f"{what}: {type(error).__name__}: {error!s:.600}{_place(error)}")
            if ONLY is not None:
                raise
        slowest = max(slowest, time.process_time() - begun)
        outcomes[outcome] += 1
        if len(failures) == MOST_FAILURES:
            break
    logging.disable(logging.NOTSET)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    text = f"{subject}: {len(inputs)} inputs of seed {SEED}: {counts}; slowest {slowest:.2f} s"
    if COUNT > USUAL_COUNT:
        text += "\n    " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(30))
    assert not failures, "\n".join([text, *failures])
    return text


def _place(error: BaseException) -> str:
    trace, places = error.__traceback__, []
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f" ({' < '.join(reversed(places[-5:]))})"


@contextlib.contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Fails if a folder holds other files afterwards."""
    before = sorted(path.name for path in folder.iterdir())
    yield
    after = sorted(path.name for path in folder.iterdir())
    assert after == before, f"left behind: {set(after) ^ set(before)}"


def command(*arguments: object) -> tuple[int, str]:
    """(exit code, the error or what `verify` calls damaged) of `python -m quantize ...`, run in this process

    raises  AssertionError for an error of more than one line; whatever is no error of the command line
    """
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors) for errors in ("strict", "replace")]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = main([str(argument) for argument in arguments], [add_commands])
        except SystemExit as error:  # argparse
            code = error.code if isinstance(error.code, int) else 1
        for stream in streams:
            stream.flush()
    said = streams[1].buffer.getvalue().decode().removesuffix("\n").split("\n")
    assert code in (0, 1, 2), f"exit code {code}"
    found = streams[0].buffer.getvalue().decode()
    if code == 1 and arguments[0] == "verify" and "DAMAGED" in found:
        return code, found
    if code == 1:
        errors = [line for line in said if not line.startswith("\r")]  # the others are progress
        assert len(errors) == 1 and errors[0].startswith("error: "), f"needed one line: {said}"
    return code, said[-1]
