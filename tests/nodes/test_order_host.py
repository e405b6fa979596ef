"""A model whose bytes lie in another order than the file's is the same model: pictures, LoRAs, files, training."""

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.sd
import comfy.utils
from safetensors.torch import load_file

from svdquant_pack.kernels import order
from svdquant_pack.nodes.host import model
from svdquant_pack.nodes.host.bake import bake
from svdquant_pack.nodes.host.model import load_model
from svdquant_pack.tests.nodes.sampling import LORAS, forward

ARRANGED = "fragments"


@pytest.fixture(scope="module")
def natural(checkpoints):
    return load_model(str(checkpoints["int4"]))


@pytest.fixture
def arranged(checkpoints, monkeypatch):
    """The same file on a device that would read it in another order."""
    monkeypatch.setattr(model, "order_of", lambda spec, *rest: ARRANGED if spec.n % 64 == 0 else "")
    return load_model(str(checkpoints["int4"]))


def with_lora(patcher):
    lora = comfy.utils.load_torch_file(str(LORAS / "svdquant_demo_inverted_kohya.safetensors"), safe_load=True)
    return comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)[0]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_its_bytes_lie_otherwise_and_its_numbers_are_the_same(natural, arranged):
    pairs = [(natural.packed_layers()[key], module) for key, module in arranged.packed_layers().items()]
    moved = [(one, other) for one, other in pairs if other.packed.order]
    assert moved and all(not torch.equal(one.blob, other.blob) for one, other in moved)
    assert all(one.blob.shape == other.blob.shape for one, other in pairs)
    assert torch.equal(forward(arranged), forward(natural))
    assert arranged.model_size() == natural.model_size()


def test_loras_are_the_same(natural, arranged):
    assert torch.equal(forward(with_lora(arranged)), forward(with_lora(natural)))
    assert torch.equal(forward(arranged), forward(natural))


def test_what_the_host_saves_is_the_file(natural, arranged, tmp_path):
    paths = [tmp_path / "natural.safetensors", tmp_path / "arranged.safetensors"]
    for path, patcher in zip(paths, (natural, arranged), strict=True):
        comfy.sd.save_checkpoint(str(path), patcher)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert same(arranged.model.state_dict(), natural.model.state_dict())


def test_a_baked_lora_is_the_same_file(natural, arranged, tmp_path):
    paths = [tmp_path / "natural.safetensors", tmp_path / "arranged.safetensors"]
    for path, patcher in zip(paths, (natural, arranged), strict=True):
        bake(with_lora(patcher), path)
    assert same(*map(load_file, paths))


def test_what_only_names_the_tensors_moves_nothing(arranged, monkeypatch):
    def refuse(*args):
        raise AssertionError("a number was looked at")

    for module in arranged.packed_layers().values():
        if module.packed.order:
            monkeypatch.setitem(order.ORDERS[ARRANGED].moves, "qweight", (refuse, refuse))
    with_lora(arranged)
    tensors = arranged.model.state_dict()
    assert sum(tensor.nbytes for tensor in tensors.values()) and arranged.model_size()
    for name in tensors:
        comfy.utils.get_attr(arranged.model, name)
