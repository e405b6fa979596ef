"""From a 16-bit model to a compared 4-bit picture in one workflow on a real server, killed in the middle or not."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svdquant_pack.nodes.remote import PROMPTS
from svdquant_pack.quantize.calibration.several import describe
from svdquant_pack.tests.host.server import ExecutionFailed, Host, HostError, PromptRefused, model_tree

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.host
FILE = "svdquant_demo_digits_int4_calibrated.safetensors"


def graph(**changes) -> dict:
    """The shipped workflow with fewer pictures and steps; `changes` are inputs of any node that has them."""
    nodes = json.loads((ROOT / "workflows" / "api" / "demo_calibrate.json").read_text())
    for node in nodes.values():
        for key, value in {"batch_size": 10, "steps": 4, **changes}.items():
            if key in node["inputs"] and not isinstance(node["inputs"][key], list):
                node["inputs"][key] = value
    nodes["6"]["inputs"] |= {key: changes[key] for key in ("recipe", "overwrite") if key in changes}
    return nodes


def start(base: Path) -> Host:
    return Host(os.environ["COMFYUI_PATH"], ROOT, models=model_tree(ROOT / "workflows" / "models"), base=base)


def test_calibrate_quantize_and_compare_in_one_workflow(tmp_path):
    with start(tmp_path) as host:
        outputs = host.run(graph(steps=8))
        texts = "\n".join(host.texts(outputs))
        assert "26 layers of family flux" in texts and "mean output error 0.0" in texts
        assert "velocity error" in texts and "SSIM              0.9" in texts and texts.count("identical") >= 2
        assert len(host.images(outputs)) == 20, "ten 4-bit pictures, and ten with their 16-bit ones beside them"
        report = tmp_path / "output" / "svdquant" / f"{Path(FILE).stem}.report" / "report.json"
        assert json.loads(report.read_text())["measured_layers"] == 20
    assert len(describe(tmp_path / "output" / "svdquant" / "demo.statistics.safetensors")["runs"]) == 1


def command(*arguments: str) -> subprocess.CompletedProcess:
    """`python -m quantize` in the pack's folder."""
    return subprocess.run([sys.executable, "-m", "quantize", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_command_line_calibrates_on_a_headless_server(tmp_path):
    """The demo has no text encoder: the prompt's length becomes the seed, and a list of digits the prompt."""
    workflow, digits = tmp_path / "workflow.json", tmp_path / "digits.txt"
    statistics = tmp_path / "output" / "svdquant" / "demo.statistics.safetensors"
    nodes = {name: node for name, node in graph(steps=2, batch_size=2).items() if name in list("12345")} | {
        "6": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "x"}}
    }
    with start(tmp_path) as host:
        nodes["7"] = {"class_type": "StringLength", "inputs": {"string": "{prompt}"}}
        nodes["5"]["inputs"]["seed"] = ["7", 0]
        workflow.write_text(json.dumps(nodes))
        done = command("calibrate", str(workflow), "--server", host.url, "--prompts", str(PROMPTS), "--count", "3")
        assert done.returncode == 0 and done.stdout.startswith("3 runs; "), done.stderr
        assert "a busy night market" in done.stderr
        del nodes["7"]
        nodes["3"]["inputs"]["digits"], nodes["5"]["inputs"]["seed"] = "{prompt}", 0
        workflow.write_text(json.dumps(nodes))
        digits.write_text("# two runs\n31\n\n72\n")
        done = command("calibrate", str(workflow), "--server", host.url, "--prompts", str(digits), "--json")
        assert done.returncode == 0 and json.loads(done.stdout) == {"runs": 2, "known": 0}, done.stderr
        done = command("calibrate", str(workflow), "--server", host.url, "--count", "1")
        assert done.returncode == 1 and "needed one or more of 0123456789" in done.stderr, done.stderr
    done = command("calibrate", str(workflow), "--server", host.url, "--prompts", str(digits))
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert [run["steps"] for run in describe(statistics)["runs"]] == [2] * 5
    done = command("inspect", str(statistics))
    assert "family flux, 5 runs" in done.stdout


def test_a_file_name_may_come_from_another_node(tmp_path):
    nodes = {name: node for name, node in graph().items() if name in "16"}
    nodes["2"] = {
        "class_type": "StringConcatenate",
        "inputs": {"string_a": "my", "string_b": "model", "delimiter": "_"},
    }
    nodes["6"]["inputs"] = {
        key: value for key, value in nodes["6"]["inputs"].items() if key not in ("statistics", "after")
    } | {"file_name": ["2", 0]}
    with start(tmp_path) as host:
        assert "my_model.safetensors: 26 layers" in host.texts(host.run(nodes))[0]
        nodes["2"]["inputs"]["delimiter"] = "/../../"
        with pytest.raises(ExecutionFailed, match="needed a name inside models"):
            host.run(nodes)


def test_a_killed_server_resumes_where_it_was(tmp_path):
    work = tmp_path / "models" / "diffusion_models" / f".{FILE}.work"
    nodes = graph(recipe="best")
    with start(tmp_path) as host:
        prompt = host.queue(nodes)
        deadline = time.monotonic() + 300
        while len(list(work.glob("[!.]*.safetensors"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        host._process.kill()
        with pytest.raises((HostError, OSError)):
            host.wait(prompt, 20)
    assert not (work.parent / FILE).exists() and len(list(work.glob("*.safetensors"))) >= 3
    nodes = {name: nodes[name] for name in "16"}
    # the same statistics, now from the file; a new sampling run would change them
    del nodes["6"]["inputs"]["after"]
    nodes["6"]["inputs"] |= {"statistics_file": "demo.statistics.safetensors"}
    del nodes["6"]["inputs"]["statistics"]
    with start(tmp_path) as host:
        try:
            host.run(nodes)
        except (ExecutionFailed, PromptRefused) as error:
            raise AssertionError(f"{error}\n{host.log_tail()}") from error
        report = tmp_path / "output" / "svdquant" / f"{Path(FILE).stem}.report" / "report.json"
        assert json.loads(report.read_text())["resumed"] >= 3
        first = (work.parent / FILE).read_bytes()
        (work.parent / FILE).unlink()
        nodes["6"]["inputs"]["resume"] = False  # nothing to resume; new to the host's cache
        host.run(nodes)
        assert (work.parent / FILE).read_bytes() == first and not work.exists()
