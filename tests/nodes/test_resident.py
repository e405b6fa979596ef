"""A layer whose bytes the host would hand out as they are: the host is not asked, and nothing old is used."""

import copy
import gc
import weakref

import pytest
import torch

pytest.importorskip("comfy.ops", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.ops

from svdquant_pack.kernels import Layer, LayerSpec
from svdquant_pack.nodes.host import linear
from svdquant_pack.nodes.host.linear import SVDQuantLinear
from svdquant_pack.quantize.linear import PackedLinear
from svdquant_pack.quantize.lora.deltas import Columns
from svdquant_pack.quantize.lora.loras import LayerLoras
from svdquant_pack.tests.kernels.layers import random_layer

N, K = 96, 256


@pytest.fixture(autouse=True)
def sampling():
    with torch.no_grad():
        yield


def blob_of(seed: int, format: str = "nvfp4") -> tuple[torch.Tensor, PackedLinear]:
    made = random_layer(format, seed=seed, centred=True)
    layer = Layer(LayerSpec(format, N, K, 16), made.tensors)
    return PackedLinear.pack(layer, "w4a4")


def make(seed: int = 0, bias: bool = True) -> SVDQuantLinear:
    module = SVDQuantLinear(K, N, bias, device="cpu", dtype=torch.float32)
    blob, packed = blob_of(seed)
    module.take(packed, blob)
    if bias:
        module.bias.data = torch.randn(N)
    return module


@pytest.fixture
def asked(monkeypatch) -> list:
    """Layers that the host was asked for, although the pack takes its cast for the host's own."""
    asked, cast = [], comfy.ops.cast_bias_weight

    def spy(module, *arguments, **keywords):
        asked.append(module)
        return cast(module, *arguments, **keywords)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", spy)
    monkeypatch.setattr(linear, "HOSTS_CAST", spy)
    return asked


def by_host(module: SVDQuantLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer's output by the way through the host's cast, with nothing kept."""
    before, linear.HOSTS_CAST = linear.HOSTS_CAST, None
    try:
        return copy.deepcopy(module)(x)
    finally:
        linear.HOSTS_CAST = before


def lora(rank: int = 16, strength: float = 0.8) -> LayerLoras:
    return LayerLoras((Columns(torch.randn(K, rank) / 16, torch.randn(N, rank) / 4),), (strength,))


def test_the_host_is_not_asked_and_the_numbers_are_the_same(asked):
    module = make()
    for rows in (1, 5, 300, 5):
        x = torch.randn(2, rows, K)
        assert torch.equal(module(x), by_host(module, x))
        assert module not in asked


CHANGES = {
    "another parameter": lambda module: setattr(module, "weight", torch.nn.Parameter(blob_of(1)[0], False)),
    "other bytes in place": lambda module: module.weight.copy_(blob_of(1)[0]),
    "other data": lambda module: setattr(module.weight, "data", blob_of(1)[0]),
    "the layer anew": lambda module: module.take(*reversed(blob_of(1))),
    "moved": lambda module: module.to(torch.float32),
    "another bias": lambda module: setattr(module, "bias", torch.nn.Parameter(torch.randn(N), False)),
    "other numbers in the bias": lambda module: module.bias.mul_(2),
    "other data of the bias": lambda module: setattr(module.bias, "data", torch.randn(N)),
    "no bias": lambda module: setattr(module, "bias", None),
    "a LoRA": lambda module: module.set_loras(lora()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, asked):
    module, x = make(), torch.randn(3, K)
    (before, _) = [module(x) for _ in range(2)]
    CHANGES[change](module)
    after = [module(x) for _ in range(2)]
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], by_host(module, x))
    assert torch.equal(after[0], before) == (change == "moved")
    assert module not in asked


def test_loras_come_change_and_go(asked):
    module, x = make(), torch.randn(3, K)
    plain = module(x)
    first = lora()
    for loras in (first, LayerLoras(first.deltas, (0.3,)), LayerLoras(first.deltas, (1.0,)), lora(32), None, first):
        module.set_loras(loras)
        found = [module(x) for _ in range(2)]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], by_host(module, x))
        assert torch.equal(found[0], plain) == (loras is None)
    assert module not in asked


def test_the_host_is_asked_where_it_might_give_other_tensors(asked, monkeypatch):
    module, x = make(), torch.randn(3, K)
    wanted = module(x)
    module(x.bfloat16())
    assert len(asked) == 1, "it casts the bias"
    assert not module._would_stay(x.to("meta")), "it moves both"
    module._v = object()
    assert torch.equal(module(x), wanted) and len(asked) == 2, "dynamic VRAM may copy"
    del module._v
    module.bias_function = [lambda bias: bias + 1]
    assert not torch.equal(module(x), wanted) and len(asked) == 3
    del module.bias_function
    with torch.enable_grad():
        module(x)
    assert len(asked) == 4
    monkeypatch.setattr(linear, "HOSTS_CAST", None)
    assert torch.equal(module(x), wanted) and len(asked) == 5, "the cast is another pack's"
    monkeypatch.setattr(linear, "HOSTS_CAST", comfy.ops.cast_bias_weight)
    assert torch.equal(module(x), wanted) and len(asked) == 5


LEAVES = {
    "moved": lambda module: module.to("cpu"),
    "streamed from now on": SVDQuantLinear.leave_device,
    "another layer": lambda module: module.take(*reversed(blob_of(1))),
}


@pytest.mark.parametrize("way", LEAVES)
def test_bytes_that_leave_are_not_held(way):
    module, x = make(), torch.randn(3, K)
    for _ in range(2):
        module(x)
    views = [weakref.ref(tensor) for tensor in module._own[1].tensors.values()]
    assert all(view() is not None for view in views)
    LEAVES[way](module)
    gc.collect()
    assert not any(view() is not None for view in views)


def test_a_copy_has_its_own_bytes():
    module, x = make(), torch.randn(3, K)
    wanted = module(x)
    other = copy.deepcopy(module)
    module.weight.zero_()
    assert torch.equal(other(x), wanted) and not torch.equal(module(x), wanted)
    assert other._own[1].tensors["qweight"].data_ptr() == other.blob.data_ptr()


def test_made_in_inference_mode_and_used_outside():
    with torch.inference_mode():
        module, x = make(), torch.randn(3, K)
        (wanted, _) = [module(x) for _ in range(2)]
    x = x.clone()
    assert torch.equal(module(x), wanted)
    with torch.enable_grad():
        x.requires_grad_(True)
        module(x).sum().backward()
    assert x.grad is not None


def test_loras_that_a_call_has_placed_serve_the_next():
    module, x = make(), torch.randn(3, K)
    module.set_loras(lora())
    wanted, placed = module(x), module._loaded
    assert placed is not None and torch.equal(module(x), wanted) and module._loaded is placed
    module(x.bfloat16())
    assert module._loaded is not placed and module._loaded.dtype == torch.bfloat16


def test_a_layer_that_is_compiled_leaves_its_loras_where_they_are():
    """And no strength becomes a constant of the graph."""
    module, x, first, graphs = make(), torch.randn(3, K).bfloat16(), lora(), []
    module.set_loras(first)
    module.place_loras(torch.device("cpu"), torch.float32)
    placed, compiled = module._loaded, torch.compile(module, backend=lambda graph, _: graphs.append(graph) or graph)
    for strength in (0.8, -0.3):
        module.set_loras(LayerLoras(first.deltas, (strength,)))
        assert torch.equal(compiled(x), copy.deepcopy(module)(x)) and module._loaded is placed
    assert len(graphs) == 1


def test_loras_are_placed_beside_the_weight_unless_the_host_streams_it():
    module, elsewhere = make(), torch.device("meta")
    module.place_loras(elsewhere, torch.float32)
    assert module._loaded is None, "there are none"
    module.set_loras(lora())
    module.place_loras(elsewhere, torch.float32)
    placed = module._loaded
    assert placed.device.type == "cpu" and placed.dtype == torch.float32
    module.place_loras(elsewhere, torch.float32)
    assert module._loaded is placed, "once"
    module.loras_stay = True
    module.place_loras(elsewhere, torch.bfloat16)
    assert module._loaded.device == elsewhere and module._loaded.dtype == torch.bfloat16
