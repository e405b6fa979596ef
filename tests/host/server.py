"""A real ComfyUI server for tests and the demo: start it, send it workflows, read what comes back, end it.

    with Host(comfyui, pack=ROOT, models=model_tree(ROOT / "workflows" / "models")) as host:
        outputs = host.run(workflow)  # a workflow in API form: {node id: {"class_type": ..., "inputs": {...}}}
        first = host.images(outputs)[0]

Standard library only, so that it runs from any Python; the server runs under `python`, by default the same one.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    Workflow = Mapping[str, Mapping[str, Any]]
    Outputs = Mapping[str, Mapping[str, list[Any]]]

LAUNCHER = Path(__file__).with_name("launch.py")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
POLL_SECONDS = 0.1
TERMINATE_SECONDS = 10  # ComfyUI ends at once on SIGTERM; a node inside a long native call may not

# a proxy from the environment must not come between two ends of the loopback device
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class HostError(RuntimeError):
    """The server could not be started, or did not do what was asked."""


class PromptRefused(HostError):
    """The server's validation refused a workflow: `status` is the HTTP status, `body` its decoded answer."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        error = body.get("error") or "some outputs failed validation"
        text = error.get("message", error) if isinstance(error, dict) else error
        reasons = [
            f"node {node_id} ({entry.get('class_type')}): {reason.get('type')}: {reason.get('details')}"
            for node_id, entry in (body.get("node_errors") or {}).items()
            for reason in entry.get("errors", [])
        ]
        super().__init__("; ".join([f"ComfyUI refused the workflow (HTTP {status}): {text}", *reasons]))
        self.status, self.body = status, body


class ExecutionFailed(HostError):
    """A node raised, or the run was interrupted (then `exception_type` is `Interrupted`)."""

    def __init__(self, node_id: str, node_type: str, exception_type: str, message: str) -> None:
        super().__init__(f"node {node_id} ({node_type}): {exception_type}: {message}")
        self.node_id, self.node_type, self.exception_type, self.message = node_id, node_type, exception_type, message


def model_tree(folder: Path) -> dict[str, list[Path]]:
    """Every file below `folder` by the sub-folder it lies in: what `Host(models=...)` takes."""
    tree: dict[str, list[Path]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        tree.setdefault(file.parent.relative_to(folder).as_posix(), []).append(file)
    return tree


def run_seconds(entry: Mapping[str, Any]) -> float:
    """Seconds from the start to the end of a run, by the server's own clock; `entry` is what `Host.wait` returns."""
    times = [message["timestamp"] for _, message in entry["status"]["messages"] if "timestamp" in message]
    return (max(times) - min(times)) / 1000


@functools.cache
def has_accelerator(python: str) -> bool:
    """Whether torch under `python` has a CUDA (or ROCm) device. Asked in a child: this process may not have torch."""
    probe = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    done = subprocess.run([python, "-c", probe], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        raise HostError(f"{python} cannot import torch, which ComfyUI needs: {done.stderr.strip()[-400:]}")
    return done.returncode == 0


def _link(source: Path, target: Path) -> None:
    """Show `source` at `target`: by a symbolic link, or by a copy where links are not allowed (Windows)."""
    if not source.exists():
        raise HostError(f"{source} does not exist; ComfyUI should have seen it at {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        else:
            shutil.copy2(source, target)


class Host:
    """One ComfyUI server with one node pack, in a base folder of its own.

    comfyui      ComfyUI source tree (the folder of main.py)
    pack         the node pack, shown as custom_nodes/<pack_name>
    models       files to show below models/, by sub-folder: {"loras": [path, ...]}
    base         base folder to use and keep; default: a temporary one, removed at the end
    cpu          True: pass --cpu; False: do not; None: pass it when torch finds no accelerator
    arguments    more arguments for ComfyUI
    python       interpreter that has ComfyUI's requirements
    start_seconds  how long the server may take to answer
    """

    def __init__(
        self,
        comfyui: Path | str,
        pack: Path | str,
        *,
        pack_name: str = "comfyui-svdquant",
        models: Mapping[str, Iterable[Path]] | None = None,
        base: Path | str | None = None,
        cpu: bool | None = None,
        arguments: Sequence[str] = (),
        python: str = sys.executable,
        start_seconds: float = 180,
    ) -> None:
        self.comfyui, self.pack, self.pack_name = Path(comfyui).resolve(), Path(pack), pack_name
        self.models = models or {}
        self.cpu, self.arguments, self.python, self.start_seconds = cpu, tuple(arguments), python, start_seconds
        self._given_base = None if base is None else Path(base).resolve()
        self._process: subprocess.Popen[bytes] | None = None
        self._cleanup = contextlib.ExitStack()
        self.base = Path()
        self.url = ""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # -- life

    def start(self) -> None:
        """Start the server and wait until it answers; raises HostError with the end of its log if it does not."""
        if not (self.comfyui / "main.py").is_file():
            raise HostError(
                f"{self.comfyui} has no main.py, so it is not a ComfyUI source tree; tests/host/install.py makes one"
            )
        cpu = not has_accelerator(self.python) if self.cpu is None else self.cpu
        self._end_on_sigterm()
        self._make_base()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [self.python, str(LAUNCHER), str(self.comfyui), "--listen", "127.0.0.1", "--port", str(port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--use-pytorch-cross-attention"]
        command += [*(["--cpu"] if cpu else []), *self.arguments]
        # torch's threads otherwise spin while they wait, which on a busy machine costs a factor of ten
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.comfyui, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        self._cleanup.callback(self._end_process)
        self._wait_for_answer()

    def stop(self) -> None:
        """End the server and remove the temporary base folder. May be called at any time, and twice."""
        self._cleanup.close()

    def _end_on_sigterm(self) -> None:
        # Ctrl-C already unwinds as KeyboardInterrupt; this lets a plain `kill` unwind in the same way
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._cleanup.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    def _make_base(self) -> None:
        if self._given_base is None:
            # a file that the server still writes while it ends must not turn the clean-up into an error
            temporary = tempfile.TemporaryDirectory(prefix="svdquant-host-", ignore_cleanup_errors=True)
            self.base = Path(self._cleanup.enter_context(temporary)).resolve()
        else:
            self.base = self._given_base
        for name in ("custom_nodes", "input", "output", "models/diffusion_models", "models/loras"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        shown = {self.base / "custom_nodes" / self.pack_name: self.pack}
        for folder, files in self.models.items():
            shown |= {self.base / "models" / folder / file.name: file for file in files}
        for target, source in shown.items():
            if not target.exists():  # a kept base folder has them already
                _link(source, target)

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            self._check_alive()
            # no answer, or a cut one: still starting
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.system_stats()
                return
            time.sleep(POLL_SECONDS)
        raise HostError(f"ComfyUI gave no answer within {self.start_seconds:g} s\n{self.log_tail()}")

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            process.stdin.close()

    def _check_alive(self) -> None:
        if self._process is None:
            raise HostError("the ComfyUI server is not running: use `with Host(...)` or call start()")
        if (code := self._process.poll()) is not None:
            raise HostError(f"ComfyUI ended with exit status {code}\n{self.log_tail()}")

    # -- log

    @property
    def _log_path(self) -> Path:
        return self.base / "server.log"

    @property
    def log(self) -> str:
        """All that the server has written so far, without colour codes."""
        return COLOURS.sub("", self._log_path.read_text(errors="replace")) if self._log_path.is_file() else ""

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log, under a heading, to be shown with a failure."""
        return "\n".join(["--- end of the ComfyUI log", *self.log.splitlines()[-lines:]])

    # -- requests

    def _request(self, path: str, payload: Any = None, seconds: float = 60) -> bytes:
        data = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with _opener.open(request, timeout=seconds) as response:
            return response.read()

    def system_stats(self) -> dict[str, Any]:
        """Versions (`system`) and devices (`devices`) as the server reports them."""
        return json.loads(self._request("/system_stats"))

    def object_info(self, name: str | None = None) -> dict[str, Any]:
        """The description of every node class, or of the class `name`; raises KeyError if there is no such class."""
        if name is None:
            return json.loads(self._request("/object_info"))
        return json.loads(self._request(f"/object_info/{urllib.parse.quote(name)}"))[name]

    def queue(self, workflow: Workflow) -> str:
        """Queue a workflow in API form; returns its prompt id. Raises PromptRefused if any part of it is not valid."""
        self._check_alive()
        try:
            answer = json.loads(self._request("/prompt", {"prompt": workflow}))
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                body = json.loads(text)
            except ValueError:
                body = {"error": text}
            raise PromptRefused(error.code, body) from None
        if answer.get("node_errors"):
            # ComfyUI runs the outputs that are valid and drops the others; here that would hide a broken workflow
            self._withdraw(answer["prompt_id"])
            raise PromptRefused(200, answer)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 600) -> dict[str, Any]:
        """The history entry of a finished run; raises ExecutionFailed, or HostError if it takes too long."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._check_alive()
            # the entry is absent until the run is over, and for a moment after the server has announced its end
            entry = self.entry(prompt_id)
            if entry is not None:
                self._raise_failure(entry["status"])
                return entry
            time.sleep(POLL_SECONDS)
        self._withdraw(prompt_id)
        raise HostError(f"the workflow was not done within {timeout:g} s\n{self.log_tail()}")

    def _raise_failure(self, status: Mapping[str, Any]) -> None:
        for kind, message in status.get("messages", []):
            if kind == "execution_error":
                reason = message["exception_type"], message["exception_message"].strip()
            elif kind == "execution_interrupted":
                reason = "Interrupted", "the run was stopped before its end"
            else:
                continue
            raise ExecutionFailed(message["node_id"], message["node_type"], *reason)
        if status.get("status_str") != "success":
            raise HostError(f"ComfyUI reports {status.get('status_str')!r} without a reason\n{self.log_tail()}")

    def _withdraw(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, or stop it if it is running, so that the next one finds the server free."""
        self._request("/queue", {"delete": [prompt_id]})
        self._request("/interrupt", {"prompt_id": prompt_id})

    def run(self, workflow: Workflow, timeout: float = 600) -> Outputs:
        """Queue a workflow, wait for it, and return what its output nodes gave: {node id: {"images": [...], ...}}."""
        return self.wait(self.queue(workflow), timeout)["outputs"]

    def images(self, outputs: Outputs) -> list[bytes]:
        """Every image of `outputs` as the bytes of its file (PNG for SaveImage), fetched through /view."""
        found = [image for node in outputs.values() for image in node.get("images", [])]
        return [self._request(f"/view?{urllib.parse.urlencode(image)}") for image in found]

    def texts(self, outputs: Outputs) -> list[str]:
        """Every text of `outputs`: what output nodes returned as `{"ui": {"text": [...]}}`."""
        return [text for node in outputs.values() for text in node.get("text", [])]

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop the run in progress, if there is one, or if it is this one; its `wait` then raises ExecutionFailed."""
        self._request("/interrupt", {} if prompt_id is None else {"prompt_id": prompt_id})

    def runs(self, prompt_id: str) -> bool:
        """Whether the server is at work on a prompt at the moment."""
        return any(prompt_id in entry for entry in json.loads(self._request("/queue"))["queue_running"])

    def entry(self, prompt_id: str) -> dict[str, Any] | None:
        """The history entry of a prompt that has ended, well or not; None for another."""
        found = json.loads(self._request(f"/history/{prompt_id}")).get(prompt_id)
        return found if found and found.get("status") else None

    @property
    def pid(self) -> int:
        """The number of the server's process."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def free_memory(self) -> None:
        """Ask the server to unload every model and forget cached results. It does so when it is next idle."""
        self._request("/free", {"unload_models": True, "free_memory": True})
