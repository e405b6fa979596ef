"""Every input of every node that names a file, with every odd name, over HTTP: refused, and nothing written."""

import json
import os
from pathlib import Path

import pytest

from svdquant_pack.nodes.registry import NODE_CLASS_MAPPINGS
from svdquant_pack.tests.host.server import ExecutionFailed, Host, PromptRefused
from svdquant_pack.tests.quantize.loopback_hub import serving
from svdquant_pack.tests.quantize.test_names import BAD
from svdquant_pack.tests.soak_jobs import NAME_INPUTS, make_files

ROOT = Path(__file__).resolve().parents[2]
# inputs of text that name no file on this machine
OTHER_TEXTS = {("SVDQuantDemoPrompt", "digits")}
OTHER_TEXTS |= {("SVDQuantDownloadModel", "repo"), ("SVDQuantDownloadModel", "revision")}
pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A server that has every file that the graphs name, so that only the odd name can be refused."""
    root = tmp_path_factory.mktemp("root")
    (root / "files").mkdir()
    models = make_files(root / "files")
    with serving(b"x") as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", address)
        with Host(os.environ["COMFYUI_PATH"], ROOT, models=models, base=root / "a" / "b" / "base") as host:
            yield host


def tree(host) -> set[Path]:
    """Every file and folder from three folders above the server's own down."""
    return {path for path in host.base.parents[2].rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("where", [where for where in NAME_INPUTS if where != "download file"])
def test_no_odd_name_is_queued_and_nothing_is_written(host, where):
    before = tree(host)
    for name in BAD:
        with pytest.raises(PromptRefused) as caught:
            host.queue(NAME_INPUTS[where](name))
        assert caught.value.status == 400, name
    assert tree(host) == before


def test_no_odd_name_is_fetched(host):
    """Some of them are names that a hub may have, which then has no such file."""
    before = tree(host)
    for name in BAD:
        with pytest.raises((PromptRefused, ExecutionFailed)) as caught:
            host.run(NAME_INPUTS["download file"](name))
        if isinstance(caught.value, ExecutionFailed):
            assert caught.value.exception_type.endswith(".DownloadError"), name
    assert tree(host) == before


def test_a_usual_name_is_queued(host):
    """What is refused above is refused for its name."""
    for where in ("quantize file_name", "convert file_name", "bake file_name", "calibrate file_name"):
        prompt = host.queue(NAME_INPUTS[where](f"usual/{where.partition(' ')[0]}"))
        host.wait(prompt)
    written = {
        path.relative_to(host.base).as_posix() for path in tree(host) if "usual" in path.parts and path.is_file()
    }
    assert written == {
        *(f"models/diffusion_models/usual/{name}.safetensors" for name in ("quantize", "convert", "bake")),
        "output/svdquant/usual/calibrate.statistics.safetensors",
    }


def test_every_text_and_list_of_files_of_every_node_is_among_them(host):
    """A new node that takes a name has to be put into the table."""
    named = {
        (node["class_type"], key)
        for make in NAME_INPUTS.values()
        for node in make("SOME NAME").values()
        for key, value in node["inputs"].items()
        if isinstance(value, str) and "SOME NAME" in value
    }
    info = {name: node["input"] for name, node in host.object_info().items() if name in NODE_CLASS_MAPPINGS}
    for name, inputs in info.items():
        for key, (kind, *_) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
            files = kind == "STRING" or (isinstance(kind, list) and "safetensors" in json.dumps(kind))
            if files and (name, key) not in OTHER_TEXTS and key != "published":
                assert (name, key) in named, f"{name} {key}"
