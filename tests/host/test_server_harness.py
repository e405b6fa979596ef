"""The server harness against a real ComfyUI and a pack of two nodes that is written here."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from svdquant_pack.tests.host import server

COMFYUI = os.environ.get("COMFYUI_PATH")
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH is not set; `make host` makes a ComfyUI to point it at"),
]

PACK = """
import time


class HarnessRaise:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "harness"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"message": ("STRING", {"default": ""})}}

    def run(self, message):
        raise ValueError(message)


class HarnessSay:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "harness"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"default": ""}), "seconds": ("INT", {"default": 0, "max": 60})}}

    def run(self, text, seconds):
        from comfy.model_management import throw_exception_if_processing_interrupted

        for _ in range(seconds * 10):
            throw_exception_if_processing_interrupted()
            time.sleep(0.1)
        return {"ui": {"text": [text]}}


NODE_CLASS_MAPPINGS = {"HarnessRaise": HarnessRaise, "HarnessSay": HarnessSay}
"""
SAY = {"1": {"class_type": "HarnessSay", "inputs": {"text": "hello", "seconds": 0}}}
SLEEP = {"1": {"class_type": "HarnessSay", "inputs": {"text": "late", "seconds": 60}}}
IMAGE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 2, "color": 0}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "harness"}},
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    (folder / "__init__.py").write_text(PACK)
    return folder


@pytest.fixture(scope="module")
def host(pack):
    with server.Host(COMFYUI, pack, pack_name="harness-pack") as host:
        yield host


def test_a_pack_that_defines_no_nodes_does_no_harm(tmp_path):
    (tmp_path / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    with server.Host(COMFYUI, tmp_path) as host:
        assert host.run(IMAGE)
        base = host.base
    assert not base.exists()


def test_nodes_of_the_pack_are_known_to_the_server(host):
    assert host.object_info("HarnessSay")["python_module"] == "custom_nodes.harness-pack"
    assert "KSampler" in host.object_info()


def test_texts_and_images_come_back(host):
    assert host.texts(host.run(SAY)) == ["hello"]
    images = host.images(host.run(IMAGE))
    assert [image[:4] for image in images] == [b"\x89PNG"] * 2


def test_a_value_out_of_range_is_refused_by_name(host):
    with pytest.raises(server.PromptRefused, match="value_bigger_than_max") as refused:
        host.queue({"1": {"class_type": "HarnessSay", "inputs": {"text": "", "seconds": 61}}})
    assert refused.value.status == 400
    assert refused.value.body["node_errors"].keys() == {"1"}


def test_an_unknown_class_is_refused(host):
    with pytest.raises(server.PromptRefused, match="NoSuchNode"):
        host.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_a_workflow_that_is_valid_in_part_is_refused(host):
    broken = {"3": {"class_type": "HarnessSay", "inputs": {"text": "", "seconds": 61}}}
    with pytest.raises(server.PromptRefused, match="value_bigger_than_max"):
        host.queue(IMAGE | broken)


def test_a_node_that_raises_fails_the_run_and_not_the_server(host):
    with pytest.raises(server.ExecutionFailed) as failed:
        host.run({"7": {"class_type": "HarnessRaise", "inputs": {"message": "as asked"}}})
    error = failed.value
    assert (error.node_id, error.node_type, error.exception_type, error.message) == (
        "7",
        "HarnessRaise",
        "ValueError",
        "as asked",
    )
    assert "as asked" in host.log_tail()
    assert host.texts(host.run(SAY)) == ["hello"]


def test_a_run_can_be_interrupted(host):
    prompt = host.queue(SLEEP)
    # the request reaches a running prompt only, and the server forgets earlier ones when a run begins
    threading.Timer(1.0, host.interrupt).start()
    with pytest.raises(server.ExecutionFailed, match="Interrupted"):
        host.wait(prompt, timeout=30)


def test_a_run_that_takes_too_long_is_withdrawn(host):
    with pytest.raises(server.HostError, match="not done within"):
        host.run(SLEEP, timeout=1)
    host.free_memory()
    assert host.texts(host.run(SAY, timeout=30)) == ["hello"]


def test_a_folder_without_comfyui_is_named(tmp_path):
    with pytest.raises(server.HostError, match=r"no main\.py"), server.Host(tmp_path, tmp_path):
        pass


def test_a_server_that_cannot_start_shows_its_log(pack):
    with (
        pytest.raises(server.HostError, match="unrecognized arguments: --no-such-option"),
        server.Host(COMFYUI, pack, arguments=["--no-such-option"]),
    ):
        pass


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the server's process in /proc")
def test_no_server_outlives_its_parent(pack, tmp_path, name):
    script = (
        f"import sys, time; sys.path.insert(0, {str(server.LAUNCHER.parent)!r}); from server import Host\n"
        f"with Host({COMFYUI!r}, {str(pack)!r}, cpu=True) as host:\n"
        "    print(host._process.pid, host.base, flush=True); time.sleep(600)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # a killed parent leaves its base folder behind
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pid, base = parent.stdout.readline().split()
        os.kill(parent.pid, getattr(signal, name))
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(pid)
    assert Path(base).exists() == (name == "SIGKILL")


def _runs(pid):
    try:
        return bool(Path("/proc", pid, "cmdline").read_bytes())  # empty: ended, and not yet collected
    except (FileNotFoundError, ProcessLookupError):
        return False
