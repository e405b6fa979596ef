"""Run pytest again and again in copies of one process that has imported everything but the pack.

torch, ComfyUI and pytest take several seconds to import, more than most test files take to run. Requests and answers
are lines of JSON on stdin and stdout:

    {"arguments": [...], "cpu": s, "clock": s}  ->  {"status": exit code, "timeout": bool, "cpu": s, "output": text}

`cpu` is processor time: a busy machine makes everything slower by the clock, and hangs nothing. What a run has
imported from outside this folder is imported here after it, so that only the first one is slow. POSIX only.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path.cwd()


def outside() -> list[str]:
    """Modules that lie outside this folder, in the order of their import."""
    names = []
    for name, module in list(sys.modules.items()):
        origin = getattr(getattr(module, "__spec__", None), "origin", None)
        if origin and HERE not in Path(origin).parents and sys.modules.get(name) is module:
            names.append(name)
    return names


def child(arguments: list[str], cpu: int, output: int, seen: int) -> int:
    os.setpgid(0, 0)  # what it starts ends with it; no session of its own, which would have a priority of its own
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(output), "w") for _ in range(2))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 5))
    import pytest

    status = int(pytest.main(arguments))
    os.write(seen, json.dumps(outside()).encode())
    sys.stdout.flush()
    return status


def wait(pid: int, clock: float) -> tuple[int, float, bool]:
    """(status as the shell has it, processor time, whether the clock ran out)"""
    end, late = time.monotonic() + clock, False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, late
        if time.monotonic() > end and not late:
            late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)


def run(arguments: list[str], cpu: int, clock: int) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as seen:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                status = child(arguments, cpu, output.fileno(), seen.fileno())
            finally:
                os._exit(status)
        status, seconds, late = wait(pid, clock)
        output.seek(0)
        seen.seek(0)
        text = output.read().decode(errors="replace")
        for name in json.loads(seen.read() or "[]"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    late = late or status in (-signal.SIGXCPU, -signal.SIGKILL)
    return {"status": status, "timeout": late, "cpu": seconds, "output": text[-4000:]}


def start_host() -> None:
    """Do what the host's tests do first: a ComfyUI on the CPU."""
    spec = importlib.util.spec_from_file_location("host_conftest", HERE / "tests" / "nodes" / "conftest.py")
    assert spec and spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.path[:] = [entry for entry in sys.path if HERE not in (Path(entry or "."), *Path(entry or ".").parents)]
    if "--host" in sys.argv:
        start_host()
    for line in sys.stdin:
        answers.write(json.dumps(run(**json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
