"""A server killed at random instants while nodes write: whole files, work that is taken up, and no orphan.

Each server finishes what the one before it was killed at, then is killed itself. SVDQUANT_KILLS: see
tests/quantize/test_kills.py.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from svdquant_pack.quantize.calibration.file import Statistics
from svdquant_pack.quantize.files.lifecycle import leftovers
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.tests.host.server import Host, model_tree
from svdquant_pack.tests.quantize.test_kills import share

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "workflows" / "api"
pytestmark = pytest.mark.host
OLD = b"an older file"
Workflow = dict[str, dict[str, Any]]


def start(base: Path) -> Host:
    return Host(os.environ["COMFYUI_PATH"], ROOT, models=model_tree(ROOT / "workflows" / "models"), base=base)


def nodes(name: str, *chosen: str) -> Workflow:
    graph = json.loads((API / f"{name}.json").read_text())
    return {key: graph[key] for key in chosen or graph}


def quantizing(run: int) -> Workflow:
    graph = nodes("demo_quantize_int4")
    graph["2"]["inputs"] |= {"file_name": "quantized", "overwrite": True, "resume": True}
    graph["3"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}}
    return graph


def baking(run: int) -> Workflow:
    graph = nodes("lora_bake", "1", "2", "8")
    graph["1"]["inputs"]["model_name"] = "base.safetensors"
    graph["8"]["inputs"] |= {"file_name": "baked", "overwrite": True}
    return graph


def calibrating(run: int) -> Workflow:
    graph = nodes("demo_calibrate", "1", "2", "3", "4", "5")
    graph["2"]["inputs"] |= {"file_name": "killed", "tokens": 512}
    graph["4"]["inputs"]["batch_size"] = 4
    graph["5"]["inputs"] |= {"steps": 6, "seed": run}
    graph["6"] = {"class_type": "SaveLatent", "inputs": {"samples": ["5", 0], "filename_prefix": "x"}}
    return graph


def kill(host: Host) -> None:
    host._process.kill()
    host._process.wait()


def unfinished(base: Path) -> list[str]:
    return [each.path.name for each in leftovers(base)]


def test_a_server_killed_at_any_instant_is_started_again_and_finishes(tmp_path, record_property):
    models, random = tmp_path / "models" / "diffusion_models", Random("server kills")
    statistics = tmp_path / "output" / "svdquant" / "killed.statistics.safetensors"
    files = {quantizing: models / "quantized.safetensors", baking: models / "baked.safetensors"}
    order = [work for work in (quantizing, calibrating, baking) for _ in range(share(4))]
    seconds, contents, kills, taken_up = {}, {}, 0, 0
    killed = None
    for turn, work in enumerate([*order, None]):
        with start(tmp_path) as host:
            if killed is None:  # once undisturbed: how long each takes, and what it writes
                for each in (quantizing, calibrating, baking):
                    if each is baking:
                        (models / "base.safetensors").write_bytes(contents[quantizing])
                    begun = time.monotonic()
                    host.run(each(0))
                    seconds[each] = time.monotonic() - begun
                    if each in files:
                        contents[each] = files[each].read_bytes()
            else:
                before = unfinished(tmp_path)
                taken_up += f".{files[quantizing].name}.work" in before
                runs = 0 if killed is not calibrating else len(Statistics.open(statistics).metadata["runs"])
                host.run(killed(turn))
                assert unfinished(tmp_path) == [], f"{before} were there when the server was started again"
                if killed in files:
                    assert files[killed].read_bytes() == contents[killed]
                    open_checkpoint(files[killed])
                else:
                    found = Statistics.open(statistics)
                    assert len(found.metadata["runs"]) == runs + 1
                    assert all(found.entry(layer).kept for layer in found.entries)
            if work is None:
                break
            if work in files:
                files[work].write_bytes(OLD)
            host.queue(work(1000 + turn))
            time.sleep(random.random() * seconds[work])
            kill(host)
            kills += 1
            if work in files:
                assert files[work].read_bytes() in (OLD, contents[work])
            killed = work
    record_property(
        "figures",
        f"server: {kills} kills, {share(4)} each while it quantized, calibrated and baked within "
        f"{', '.join(f'{each:.1f}' for each in seconds.values())} s; finished layers were taken up {taken_up} times",
    )


def test_the_calibrate_command_or_its_server_is_killed_at_any_instant(tmp_path, record_property):
    """Whichever is killed, the other one ends, and what was finished counts."""
    statistics = tmp_path / "output" / "svdquant" / "killed.statistics.safetensors"
    workflow, prompts, random, kills = tmp_path / "w.json", tmp_path / "digits.txt", Random("calibrate"), 0
    graph = calibrating(0)
    graph["3"]["inputs"]["digits"] = "{prompt}"
    workflow.write_text(json.dumps(graph))
    prompts.write_text("12\n34\n56\n")
    command = [sys.executable, "-m", "quantize", "calibrate", str(workflow), "--json"]
    command += ["--prompts", str(prompts), "--server"]

    def begin(host: Host) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, host.url], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(host: Host) -> None:
        runs = len(Statistics.open(statistics).metadata["runs"]) if statistics.exists() else 0
        child = begin(host)
        answer, said = child.communicate(timeout=300)
        assert child.returncode == 0, said
        found, ran = Statistics.open(statistics), json.loads(answer)
        # the prompt that a killed command left running may be the first of these: the server has it then
        assert (ran["runs"], ran["known"]) in ((3, 0), (2, 1))
        assert len(found.metadata["runs"]) >= runs + ran["runs"]
        assert all(found.entry(layer).kept for layer in found.entries)
        assert unfinished(tmp_path) == []

    total = share(6)
    while kills < total:
        with start(tmp_path) as host:
            begun = time.monotonic()
            finish(host)
            seconds = time.monotonic() - begun
            for _ in range(min(2, total - kills)):
                child = begin(host)
                time.sleep(random.random() * seconds)
                child.kill()
                child.communicate()
                kills += 1
                finish(host)
            if kills < total or total == 1:
                child = begin(host)
                time.sleep(random.random() * seconds)
                kill(host)
                said = child.communicate(timeout=120)[1]
                assert child.returncode == 1 and "error: " in said and "Traceback" not in said, said
                kills += 1
    with start(tmp_path) as host:
        finish(host)
    record_property("figures", f"calibrate command: {kills} kills of it or its server within {seconds:.1f} s")
