"""The bypass loaders of newer hosts, which wrap a layer's forward and add to it; against the dense model."""

import pytest
import torch

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")
pytest.importorskip("comfy_extras.nodes_lora_debug", reason="this ComfyUI has no bypass loaders")

import comfy.model_management
import folder_paths
from comfy_extras import nodes_lora_debug
from safetensors.torch import save_file

from svdquant_pack.nodes.host.model import load_model
from svdquant_pack.nodes.lora_info import SVDQuantLoraInfo
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.tests.nodes.lora_files import dense_of, dense_weights, lora_of, with_file
from svdquant_pack.tests.nodes.sampling import forward, relative

EXACT = 2e-5  # float32 sums in another order
ADDING = ("lora", "lokr", "lokr_low", "loha")  # the host's bypass has no DoRA magnitude and no 1x1 kernel on a linear


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def pair(request, checkpoints, demo_file):
    checkpoint = open_checkpoint(checkpoints[request.param])
    return load_model(str(checkpoints[request.param]), compute="w16"), dense_of(checkpoint, demo_file)


@pytest.fixture
def bypass(tmp_path, monkeypatch):
    """What the node LoraLoaderBypassModelOnly does with a file."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))

    def load(patcher, lora, strength: float):
        save_file(lora, tmp_path / "bypass.safetensors")
        node = nodes_lora_debug.LoraLoaderBypassModelOnly()
        return node.load_lora_model_only(patcher, "bypass.safetensors", strength)[0]

    return load


@pytest.mark.parametrize("strength", [1.0, -0.6, 0.0])
def test_a_bypass_lora_is_that_of_the_dense_model(pair, bypass, strength):
    lora = lora_of(ADDING, dense_weights(*pair))
    plain = forward(pair[0])
    four_bit, dense = (bypass(patcher, lora, strength) for patcher in pair)
    found = forward(four_bit)
    assert relative(found, forward(dense)) < EXACT
    assert torch.equal(found, plain) == (strength == 0)
    assert torch.equal(forward(pair[0]), plain), "nothing stays"
    assert torch.equal(forward(four_bit), found)


def test_a_plain_lora_is_the_same_through_either_loader(pair, bypass):
    """Of a LoKr or LoHa the host's bypass makes something else, in the dense model too."""
    lora = lora_of(("lora",), dense_weights(*pair))
    assert relative(forward(bypass(pair[0], lora, 0.8)), forward(with_file(pair[0], lora, 0.8))) < EXACT


def test_it_adds_to_a_loaded_lora_and_follows_its_changes(pair, bypass):
    weights = dense_weights(*pair)
    below, above = lora_of(("lora", "dora_out"), weights, 1), lora_of(ADDING, weights, 2)
    for strength in (0.3, 0.9):  # the second only swaps LoRAs in place
        four_bit, dense = (bypass(with_file(patcher, below, strength), above, 0.5) for patcher in pair)
        assert relative(forward(four_bit), forward(dense)) < EXACT
    assert relative(forward(with_file(pair[0], below, 0.9)), forward(with_file(pair[1], below, 0.9))) < EXACT


def test_half_loaded_is_the_same_model(pair, bypass):
    four_bit = bypass(pair[0], lora_of(ADDING, dense_weights(*pair)), 0.7)
    whole = forward(four_bit)
    comfy.model_management.unload_all_models()
    four_bit.patch_model(four_bit.load_device, lowvram_model_memory=four_bit.model_size() // 2)
    assert torch.equal(forward(four_bit), whole)


def test_the_report_says_that_something_is_bypassed(pair, bypass):
    lora = lora_of(("lora",), dense_weights(*pair))
    text = SVDQuantLoraInfo().describe(bypass(pair[0], lora, 0.7))["result"][0]
    assert "This MODEL has no LoRA" in text and "beside the layers: bypass_lora" in text
    assert "beside the layers" not in SVDQuantLoraInfo().describe(pair[0])["result"][0]
