"""Calibrating from the command line: what is sent to the server, and what its answers mean."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from svdquant_pack.nodes.remote import CalibrateError, add_commands, calibrate, read_prompts, with_prompt
from svdquant_pack.quantize.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = json.loads((ROOT / "workflows" / "api" / "quantize_your_model.json").read_text())


@pytest.fixture
def server():
    """A server that accepts every workflow and finishes it, but for prompts that say fail or refuse."""
    queued = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, code, data):
            body = json.dumps(data).encode()
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
            queued.append(data)
            if data["3"]["inputs"]["text"] == "refuse":
                self.answer(400, {"error": {"type": "invalid_prompt"}})
            else:
                self.answer(200, {"prompt_id": str(len(queued) - 1)})

        def do_GET(self):
            place = self.path.rpartition("/")[2]
            if place == "queue":
                self.answer(200, {"queue_running": [], "queue_pending": []})
                return
            kept = [*WORKFLOW] if queued[int(place)] in queued[: int(place)] else ["4"]
            messages = [["execution_start", {}], ["execution_cached", {"nodes": kept}]]
            status = {"completed": True, "status_str": "success", "messages": messages}
            if queued[int(place)]["3"]["inputs"]["text"] == "forget":  # as after a restart
                self.answer(200, {})
                return
            if queued[int(place)]["3"]["inputs"]["text"] == "fail":
                message = ["execution_error", {"exception_message": "out of luck\n"}]
                status = {"completed": False, "status_str": "error", "messages": [message]}
            self.answer(200, {place: {"status": status}})

    made = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}", queued
    made.shutdown()


def test_every_prompt_is_run_once_with_its_own_seed(server):
    url, queued = server
    assert calibrate(url, WORKFLOW, ["a cat", "a dog"], poll=0) == 2
    assert [graph["3"]["inputs"]["text"] for graph in queued] == ["a cat", "a dog"]
    assert [graph["8"]["inputs"]["seed"] for graph in queued] == [0, 1]


def test_what_the_server_had_in_memory_is_no_run(server):
    """`calibrate` said that it ran what the server answered without running it."""
    assert calibrate(server[0], WORKFLOW, ["a cat"], poll=0) == 1
    assert calibrate(server[0], WORKFLOW, ["a cat", "a dog"], poll=0) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("fail", "out of luck"), ("refuse", "invalid_prompt"), ("forget", "knows nothing of the run 0")],
)
def test_failures_say_what_the_server_said(server, prompt, message):
    with pytest.raises(CalibrateError, match=message):
        calibrate(server[0], WORKFLOW, [prompt], poll=0)


def test_the_prompt_goes_where_the_placeholder_is_or_into_the_positive_text():
    made = with_prompt(WORKFLOW, "a cat", 7)
    assert made["3"]["inputs"]["text"] == "a cat" and WORKFLOW["3"]["inputs"]["text"].startswith("a red fox")
    own = {"1": {"class_type": "X", "inputs": {"words": "photo of {prompt}, sharp", "text": "kept", "noise_seed": 0}}}
    assert with_prompt(own, "a cat", 7)["1"]["inputs"] == {
        "words": "photo of a cat, sharp",
        "text": "kept",
        "noise_seed": 7,
    }
    with pytest.raises(CalibrateError, match="no place for a prompt"):
        with_prompt({"1": {"class_type": "X", "inputs": {}}}, "a cat", 0)


def test_a_workflow_without_the_node_is_refused():
    with pytest.raises(CalibrateError, match="no SVDQuant Calibrate node"):
        calibrate("http://127.0.0.1:9", {"1": {"class_type": "KSampler", "inputs": {}}}, ["a"])


def test_the_shipped_prompts_are_many_and_distinct(tmp_path):
    prompts = read_prompts()
    assert len(prompts) >= 32 and len(set(prompts)) == len(prompts)
    (tmp_path / "p.txt").write_text("# nothing\n\n")
    with pytest.raises(CalibrateError, match="holds no prompt"):
        read_prompts(tmp_path / "p.txt")


def test_a_server_that_is_gone_is_an_error_that_names_it(server):
    url = server[0].rpartition(":")[0] + ":9"
    with pytest.raises(ConnectionError, match=f"^{url}/prompt cannot be reached"):
        calibrate(url, WORKFLOW, ["a cat"], poll=0)


@pytest.mark.parametrize("answer", [b"", b"no HTTP\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_what_is_no_server_is_named(answer):
    """An answer that is cut was an exception of the HTTP library, and a traceback on the command line."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with listening.accept()[0] as one:
                one.recv(1 << 16)
                one.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises((ConnectionError, CalibrateError), match=url):
            calibrate(url, WORKFLOW, ["a cat"], poll=0)
        thread.join()


def test_an_error_has_a_line_of_its_own_after_progress(tmp_path, capsys):
    """It stood behind the prompt that was running."""
    (tmp_path / "w.json").write_text(json.dumps(WORKFLOW))
    assert main(["calibrate", str(tmp_path / "w.json"), "--server", "http://127.0.0.1:9"], [add_commands]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: http://127.0.0.1:9/prompt cannot be reached")
