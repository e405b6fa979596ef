"""The LoRA workflows in a real ComfyUI server."""

import json
import os
from pathlib import Path

import pytest

from svdquant_pack.tests.host.server import Host, model_tree

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "workflows" / "api"
pytestmark = pytest.mark.host


def workflow(name: str) -> dict:
    """A shipped API workflow with fewer pictures and steps."""
    graph = json.loads((API / f"{name}.json").read_text())
    for node in graph.values():
        node["inputs"] |= {key: value for key, value in {"batch_size": 10, "steps": 6}.items() if key in node["inputs"]}
    return graph


@pytest.fixture(scope="module")
def host():
    with Host(os.environ["COMFYUI_PATH"], ROOT, models=model_tree(ROOT / "workflows" / "models")) as host:
        host.run(workflow("demo_quantize_int4"))
        yield host


def test_the_lora_workflows_run(host):
    (text,) = host.texts(host.run(workflow("lora_two_info")))
    assert "LoRA 1: svdquant_demo_inverted_kohya.safetensors" in text, "the loader's file is named"
    assert "LoRA 2: svdquant_demo_inverted_diffusers.safetensors" in text and "-0.3" in text
    assert "total: 20 of 26 4-bit layers" in text
    outputs = host.run(workflow("lora_bake"))
    assert len(host.images(outputs)) == 10
    assert any("20 layers have the LoRAs inside, 0.000% of their energy lost" in text for text in host.texts(outputs))


def test_a_scheduled_lora_gives_other_pictures_and_is_gone_afterwards(host):
    plain = host.images(host.run(workflow("demo_int4")))
    scheduled = host.images(host.run(workflow("lora_scheduled")))
    assert len(scheduled) == 10
    assert scheduled[0] != plain[0]
    again = workflow("demo_int4")
    again["5"]["inputs"]["steps"] = 5  # else the host answers from its cache
    host.run(again)
    again["5"]["inputs"]["steps"] = 6
    assert host.images(host.run(again))[0] == plain[0]
