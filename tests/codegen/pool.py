"""Runs the compile cases in as many worker processes as there are CPU cores, each case once."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue

from .cross import Compiled

WORKER = Path(__file__).with_name("worker.py")
OTHER_TRITON = "SVDQUANT_TRITON"  # environment variable: a folder with a triton other than the installed one
Job = tuple[str, str]  # case name, target


@dataclass(frozen=True)
class Listing:
    """The triton that will compile, what there is to compile, and why nothing is.

    cases  {name: {"kernel": its name, "targets", "expect", "allow_spills", "async_marker"}} as in CompileCase
    """

    triton: str = ""
    cases: dict[str, dict] = field(default_factory=dict)
    missing: str | None = None

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple((name, target) for name, case in self.cases.items() for target in case["targets"])


def _start() -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    if path := os.environ.get(OTHER_TRITON):
        environment["PYTHONPATH"] = path
    return subprocess.Popen(
        [sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
    )


def _greeting(worker: subprocess.Popen) -> dict:
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"{WORKER.name} ended with exit code {worker.wait()} before it answered, see its output")
    return json.loads(line)


@cache
def listing() -> Listing:
    """The cases of every kernel, asked of a worker: this process never imports triton."""
    worker = _start()
    with worker.stdin, worker.stdout:
        answer = _greeting(worker)
    worker.wait()
    if "missing" in answer:
        return Listing(missing=answer["missing"])
    return Listing(answer["triton"], answer["cases"])


_done: dict[Job, Compiled] = {}


def compile_jobs(jobs: Iterable[Job]) -> dict[Job, Compiled]:
    """{(case, target): Compiled}; what was compiled before in this process is not compiled again."""
    wanted = list(dict.fromkeys(jobs))
    queue: SimpleQueue[Job] = SimpleQueue()
    for job in wanted:
        if job not in _done:
            queue.put(job)
    failures: list[BaseException] = []
    count = min(os.cpu_count() or 1, queue.qsize())
    threads = [threading.Thread(target=_drain, args=(queue, failures)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return {job: _done[job] for job in wanted}


def _drain(queue: "SimpleQueue[Job]", failures: list[BaseException]) -> None:
    """Feed one worker until the queue is empty. A case that kills the worker is reported as its error."""
    worker = None
    try:
        while True:
            job = queue.get_nowait()
            if worker is None:
                worker = _start()
                _greeting(worker)
            worker.stdin.write(" ".join(job) + "\n")
            line = worker.stdout.readline()
            if line:
                _done[job] = Compiled(**json.loads(line))
            else:
                _done[job] = Compiled(error=f"the compiler process died, exit code {worker.wait()}")
                worker = None
    except Empty:
        pass
    except BaseException as error:  # raised again by the caller's thread
        failures.append(error)
    finally:
        if worker is not None:
            worker.stdin.close()
            worker.wait()
