"""From a 16-bit model to a compared 4-bit picture in one workflow on a real server, killed in the middle or not."""

import json
import os
import time
from pathlib import Path

import pytest

from svdquant_pack.quantize.calibrate import calibrate
from svdquant_pack.quantize.statistics import describe
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
        assert "velocity error" in texts and "identical" in texts and len(host.images(outputs)) == 10
        report = tmp_path / "output" / "svdquant" / f"{Path(FILE).stem}.report" / "report.json"
        assert json.loads(report.read_text())["measured_layers"] == 20
        # the command line adds runs to the same statistics
        nodes = {name: node for name, node in graph(steps=4).items() if name in "12345"} | {
            "6": {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "x"}}
        }
        nodes["3"]["inputs"]["digits"] = "{prompt}"
        assert calibrate(host.url, nodes, ["123", "456"], poll=0.1) == 2
    assert len(describe(tmp_path / "output" / "svdquant" / "demo.statistics.safetensors")["runs"]) == 3


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
    del nodes["2"], nodes["4"], nodes["5"], nodes["7"], nodes["8"], nodes["9"], nodes["3"]
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
        host.run(json.loads(json.dumps(nodes).replace('"rank": 16', '"overwrite": true, "rank": 16')))
        assert (work.parent / FILE).read_bytes() == first and not work.exists()
