"""The pack in a real ComfyUI server, driven over HTTP as a front end or a script does."""

import json
import os
from pathlib import Path

import pytest

from svdquant_pack.tests.host.server import ExecutionFailed, Host, PromptRefused, model_tree

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "workflows" / "api"
NODES = {
    "SVDQuantLoadModel",
    "SVDQuantQuantizeModel",
    "SVDQuantConvertModel",
    "SVDQuantDownloadModel",
    "SVDQuantModelInfo",
    "SVDQuantDemoModel",
    "SVDQuantDemoPrompt",
    "SVDQuantDemoDecode",
    "SVDQuantDemoVae",
}
pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield from started()


def started():
    with Host(os.environ["COMFYUI_PATH"], ROOT, models=model_tree(ROOT / "workflows" / "models")) as host:
        yield host


def workflow(name: str, **changes) -> dict:
    """A shipped API workflow with fewer images and steps; `changes` are inputs of any node that has them."""
    graph = json.loads((API / f"{name}.json").read_text())
    for node in graph.values():
        for key, value in {"batch_size": 10, "steps": 4, **changes}.items():
            if key in node["inputs"] and not isinstance(node["inputs"][key], list):
                node["inputs"][key] = value
    return graph


@pytest.fixture(scope="module")
def quantized(host) -> str:
    """Name of a 4-bit file that the quantize node has written."""
    outputs = host.run(workflow("demo_quantize_int4"))
    assert "26 layers of family flux" in host.texts(outputs)[0]
    return "svdquant_demo_digits_int4_r16.safetensors"


def test_every_node_is_there(host):
    info = host.object_info()
    assert info.keys() >= NODES
    for name in NODES:
        assert info[name]["python_module"].startswith("custom_nodes.")
        assert info[name]["description"] and info[name]["category"].startswith("SVDQuant")


def test_the_pack_is_imported_without_a_word(host):
    pack_lines = [line for line in host.log.splitlines() if f"custom_nodes{os.sep}comfyui-svdquant" in line]
    assert len(pack_lines) == 1 and "seconds: " in pack_lines[0], "only the host's own list of import times"


def test_the_quantized_file_is_offered(host, quantized):
    choices = host.object_info("SVDQuantLoadModel")["input"]["required"]["model_name"][0]
    assert quantized in choices
    assert not list((host.base / "models" / "diffusion_models").glob(".*.tmp"))


@pytest.mark.parametrize("name", ["demo_16bit", "demo_16bit_lora", "demo_int4", "demo_int4_lora"])
def test_shipped_workflows_run(host, quantized, name):
    assert len(host.images(host.run(workflow(name)))) == 10


@pytest.fixture(scope="module")
def quantized_nvfp4(host) -> None:
    host.run(workflow("demo_quantize_nvfp4"))


def test_nvfp4_workflows_run(host, quantized_nvfp4):
    outputs = host.run(workflow("demo_nvfp4"))
    assert len(host.images(outputs)) == 10
    assert any("nvfp4" in text and "reference" in text for text in host.texts(outputs))


@pytest.mark.parametrize("path", sorted(API.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_workflow_fits_the_nodes(host, path):
    """Class names and inputs are what the host offers; the files of large models are not here to run them."""
    info = host.object_info()
    for number, node in json.loads(path.read_text()).items():
        inputs = info[node["class_type"]]["input"]
        required, optional = set(inputs["required"]), set(inputs.get("optional", {}))
        assert required <= node["inputs"].keys() <= required | optional, f"node {number}"


def refused(host, graph) -> str:
    with pytest.raises(PromptRefused) as caught:
        host.queue(graph)
    assert caught.value.status == 400
    return str(caught.value)


def test_a_plain_model_is_refused_when_queued(host):
    message = refused(host, workflow("demo_int4", model_name="svdquant_demo_digits.safetensors"))
    assert "Load Diffusion Model" in message and "SVDQuantLoadModel" in message


def test_a_missing_file_is_refused_when_queued(host):
    assert "is not in models/diffusion_models" in refused(host, workflow("demo_int4", model_name="gone.safetensors"))


def test_a_truncated_file_is_refused_when_queued(host, quantized):
    folder = host.base / "models" / "diffusion_models"
    (folder / "cut.safetensors").write_bytes((folder / quantized).read_bytes()[:-1000])
    message = refused(host, workflow("demo_int4", model_name="cut.safetensors"))
    assert "cut.safetensors" in message and "truncated" in message


@pytest.mark.parametrize(
    ("compute", "message"), [("w4a8", "but its nvfp4 layers have auto, w4a4, w8a8"), ("w3", "known are auto, w4a4")]
)
def test_a_mode_that_the_file_has_not_is_refused_when_queued(host, quantized_nvfp4, compute, message):
    assert f"compute is '{compute}', {message}" in refused(host, workflow("demo_nvfp4", compute=compute))


def test_the_info_node_tells_the_mode_that_was_asked_for(host, quantized):
    texts = host.texts(host.run(workflow("demo_int4", compute="w4a8")))
    assert any("compute   w4a8" in text and "reference w4a8 (20 layers)" in text for text in texts)


def test_a_model_that_runs_as_measured_says_so(host, quantized):
    """Measured while it loads, with the real clock; the file is the server's own."""
    texts = host.texts(host.run(workflow("demo_int4", compute="measured")))
    assert any("compute   measured" in text and ", measured on " in text for text in texts), texts
    texts = host.texts(host.run(workflow("demo_int4", compute="auto")))
    assert any("by the tables" in text and "measured on" not in text for text in texts), texts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 1024}, "value_bigger_than_max"),
        ({"format": "int3"}, "value_not_in_list"),
        ({"file_name": "../outside"}, "needed a name inside"),
        ({"file_name": ""}, "needed a name inside"),
        ({"file_name": "C:evil"}, "starts at a drive or at the root"),
        ({"file_name": "\\Windows\\evil"}, "starts at a drive or at the root"),
        ({"file_name": "sub/aux"}, "is a device on Windows"),
        ({"file_name": "x\0"}, "it holds"),
        ({"file_name": "x" * 300}, "at most 255 are possible"),
    ],
)
def test_bad_values_are_refused_when_queued(host, changes, message):
    assert message in refused(host, workflow("demo_quantize_int4", **changes))


def failed(host, graph) -> ExecutionFailed:
    with pytest.raises(ExecutionFailed) as caught:
        host.run(graph)
    return caught.value


def test_a_rank_that_is_no_multiple_of_16_fails_with_the_reason(host):
    error = failed(host, workflow("demo_quantize_int4", rank=20, file_name="odd"))
    assert error.node_type == "SVDQuantQuantizeModel" and "multiple of 16" in error.message
    assert not (host.base / "models" / "diffusion_models" / "odd.safetensors").exists()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ({"fallback": float("nan")}, "fallback is nan, needed"),
        ({"act8_share": float("nan")}, "act8_share is nan, needed"),
    ],
)
def test_a_number_that_is_none_passes_the_hosts_bounds_and_not_ours(host, number, message):
    graph = workflow("demo_quantize_int4", file_name="odd")
    graph["2"]["inputs"] |= number
    error = failed(host, graph)
    assert error.exception_type == "ValueError" and message in error.message


def test_a_size_of_statistics_that_is_none_is_named(host):
    graph = workflow("demo_16bit")
    graph["8"] = {
        "class_type": "SVDQuantCalibrate",
        "inputs": {"model": ["1", 0], "file_name": "odd", "tokens": 64, "disk_gb": float("nan"), "start_over": False},
    }
    graph["5"]["inputs"]["model"] = ["8", 0]
    assert "disk_gb is nan, needed a number of gigabytes" in failed(host, graph).message


def test_an_existing_file_is_not_overwritten_unasked(host, quantized):
    # another prefix makes the graph new to the host's cache
    graph = workflow("demo_quantize_int4", rank=32)
    assert "overwrite" in failed(host, graph).message
    for node in graph.values():
        if node["class_type"] == "SVDQuantQuantizeModel":
            node["inputs"]["overwrite"] = True
    assert "26 layers" in host.texts(host.run(graph))[0]


def test_a_cancelled_quantization_leaves_no_model(host):
    import time

    folder = host.base / "models" / "diffusion_models"
    graph = workflow("demo_quantize_int4", file_name="stopped")
    prompt = host.queue(graph)
    deadline = time.monotonic() + 60
    while not list(folder.glob(".stopped*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(folder.glob(".stopped*")), "the run has begun to write"
    host.interrupt()
    with pytest.raises(ExecutionFailed, match="Interrupted"):
        host.wait(prompt)
    assert not list(folder.glob("stopped*")), "only finished layers are kept, for the next run"


def test_a_lora_for_another_model_fails_by_name_and_the_server_goes_on(host, quantized):
    from safetensors.torch import save_file

    torch = pytest.importorskip("torch")
    foreign = {
        "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.zeros(3072, 4),
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(4, 3072),
    }
    save_file(foreign, host.base / "models" / "loras" / "foreign.safetensors")
    error = failed(host, workflow("demo_int4_lora", lora_name="foreign.safetensors"))
    assert "double_blocks.0.img_attn.proj" in error.message and "another model" in error.message
    assert "(3072, 4)" in error.message and "(128, r)" in error.message
    assert len(host.images(host.run(workflow("demo_int4", seed=9)))) == 10


@pytest.mark.parametrize("pack_name", ["comfyui-svdquant", "My Pack-1.2", "svdquant"])
def test_the_pack_loads_under_any_folder_name(pack_name):
    with Host(os.environ["COMFYUI_PATH"], ROOT, pack_name=pack_name) as host:
        assert host.object_info().keys() >= NODES
