"""Order of the numbers in memory: each has its inverse, and whoever wants natural numbers gets them."""

import pytest
import torch

from svdquant_pack.kernels import Layer, dispatch, svdquant_linear
from svdquant_pack.kernels.backends import Backend, each_call, reference
from svdquant_pack.kernels.order import ORDERS, unread
from svdquant_pack.quantize.linear import PackedLinear, read
from svdquant_pack.tests.kernels.layers import random_layer

SHAPES = [(64, 64), (128, 192), (192, 320), (64, 1088)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_each_way_undoes_the_other(n, k, dtype, order):
    layer = random_layer("int4", n, k, 16, dtype=dtype)
    arranged = layer.in_order(order)
    assert arranged.order == order and arranged.spec == layer.spec
    arranged = Layer(arranged.spec, arranged.tensors, order)  # checks every shape and dtype
    assert not torch.equal(arranged["qweight"], layer["qweight"])
    again = arranged.in_order("")
    assert again.order == "" and all(torch.equal(again[name], tensor) for name, tensor in layer.tensors.items())
    restored, other = ORDERS[order].restore(layer.tensors), ORDERS[order].arrange
    assert all(torch.equal(part, layer[name]) for name, part in other(restored).items())


def test_fragments_lie_as_their_formula_says():
    n, k = 128, 192
    words = torch.arange(n * k // 8, dtype=torch.int32).view(n, k // 8)
    scales = torch.arange(float(n * k // 64)).view(k // 64, n)
    order = ORDERS["fragments"].arrange({"qweight": words.view(torch.int8), "wscales": scales})
    codes = order["qweight"].view(torch.int32).view(n // 64, k // 64, 8, 32, 2)
    parts = order["wscales"].view(n // 64, k // 64, 4, 8, 2)
    for tile, group, column, lane, half in ((0, 0, 0, 0, 1), (1, 2, 7, 31, 0), (0, 1, 2, 6, 1)):
        row = 64 * tile + 8 * column + lane // 4
        assert codes[tile, group, column, lane, half] == words[row, 8 * group + 4 * half + lane % 4]
    for tile, group, thread, column, parity in ((0, 0, 0, 1, 0), (1, 2, 3, 7, 1), (1, 0, 2, 4, 1)):
        assert parts[tile, group, thread, column, parity] == scales[group, 64 * tile + 8 * column + 2 * thread + parity]


@pytest.mark.parametrize("n", [1, 65, 96, 130])
def test_a_layer_of_ragged_tiles_stays_natural(n):
    layer = random_layer("int4", n, 128, 16)
    assert layer.in_order("fragments") is layer
    blob, packed = PackedLinear.pack(layer)
    before = blob.clone()
    assert packed.arrange(blob, "fragments", torch.device("cpu")) is packed and torch.equal(blob, before)


LAYERS = {  # of which a reader that took the bytes for natural would be seen
    "signed": {},
    "unsigned": {"act_unsigned": (0, 192)},
    "partly unsigned": {"act_unsigned": (64, 128), "centred": True},
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request) -> Layer:
    return random_layer("int4", 128, 192, 16, dtype=torch.bfloat16, **request.param)


def test_bytes_are_put_in_order_where_they_lie_and_back(layer):
    blob, packed = PackedLinear.pack(layer)
    natural, address = blob.clone(), blob.data_ptr()
    arranged = packed.arrange(blob, "fragments", torch.device("cpu"))
    assert arranged.order == "fragments" and blob.data_ptr() == address and not torch.equal(blob, natural)
    for found in (arranged.layer(blob), arranged.listed(blob)):
        assert found.order == "" and all(torch.equal(found[name], part) for name, part in layer.tensors.items())
    assert torch.equal(arranged.layer(blob).dense_weight(), layer.dense_weight())
    assert arranged.arrange(blob, "", torch.device("cpu")) == packed and torch.equal(blob, natural)


@pytest.mark.parametrize("compute", ["w4a4", "w4a8", "w8a8", "w4a8-jit", "w16", "auto"])
def test_every_mode_of_a_backend_that_knows_no_order_gives_the_same(layer, compute):
    blob, packed = PackedLinear.pack(layer, compute)
    x, bias = torch.randn(5, 192).bfloat16(), torch.randn(128).bfloat16()
    wanted = packed.forward(x, blob, bias, None)
    arranged = packed.arrange(blob, "fragments", torch.device("cpu"))
    assert torch.equal(arranged.forward(x, blob, bias, None), wanted)


def test_gradients_are_those_of_the_natural_layer(layer):
    x = torch.randn(5, 192, requires_grad=True)
    for each in (layer, layer.in_order("fragments")):
        svdquant_linear(x, each, compute="w4a4").square().sum().backward()
    both, x.grad = x.grad, None
    svdquant_linear(x, layer, compute="w4a4").square().sum().backward()
    torch.testing.assert_close(both, 2 * x.grad)


@pytest.fixture
def eager(monkeypatch):
    """The reference, as if it read fragments in w4a4: what it was handed."""
    seen = []

    def linear(x, layer, *rest):
        seen.append(layer.order)
        return reference.linear(x, layer.in_order(""), *rest)

    def order(spec, compute):
        return "fragments" if compute == "w4a4" else ""

    backend = Backend("reference", lambda call: 99, each_call(linear, epilogue=True), order)
    monkeypatch.setattr(dispatch, "discover", lambda: ({"reference": backend}, {}))
    monkeypatch.setattr(dispatch, "_chosen", {})
    return seen


def test_a_backend_gets_the_order_that_it_wants_and_else_natural_numbers(eager, layer):
    x = torch.randn(5, 192).bfloat16()
    arranged = layer.in_order("fragments")
    for compute, given in (("w4a4", "fragments"), ("w16", "")):
        assert torch.equal(svdquant_linear(x, arranged, compute=compute), svdquant_linear(x, layer, compute=compute))
        assert eager == [given, ""]
        eager.clear()


def test_what_is_prepared_gets_the_order_that_it_wants_too(eager, layer):
    x, cpu = torch.randn(5, 192).bfloat16(), torch.device("cpu")
    for compute, given in (("w4a4", "fragments"), ("w16", "")):
        blob, packed = PackedLinear.pack(layer, compute)
        wanted = packed.forward(x, blob, None, None)
        arranged = packed.arrange(blob, "fragments", cpu)
        eager.clear()
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(arranged.forward(x, blob, None, None), wanted)
                assert torch.equal(arranged.forward(x, arranged.as_it_lies(blob), None, None), wanted)
        assert eager == [given] * 6
        assert read(arranged.text) == arranged


def test_an_order_is_for_all_numbers_of_rows_or_for_none(eager, layer):
    cpu = torch.device("cpu")
    assert dispatch.order_of(layer.spec, cpu, torch.float32, "w4a4") == "fragments"
    assert dispatch.order_of(layer.spec, cpu, torch.float32, "w16") == ""
    assert dispatch.order_of(random_layer("int4", 65, 192, 16).spec, cpu, torch.float32, "w4a4") == ""
    assert dispatch.order_of(layer.spec, cpu, torch.float32, "no such mode") == ""


class TestUnread:
    def test_its_numbers_are_made_by_what_reads_them(self):
        made = []

        def move(tensor):
            made.append(1)
            return tensor.flip(0)

        source = torch.arange(6).view(3, 2)
        found = unread(source, move)
        assert found.shape == (3, 2) and found.dtype == torch.int64 and found.nbytes == 48 and not made
        assert torch.equal(found, source.flip(0)) and made
        assert found.detach()[0].tolist() == [4, 5]
        assert torch.cat((found, found)).shape == (6, 2)

    def test_what_saves_it_makes_it_whole_or_is_told_to(self, tmp_path):
        from safetensors.torch import load_file, save_file

        source = torch.arange(6).view(3, 2)
        found = unread(source, lambda tensor: tensor.flip(0))
        assert not found.is_contiguous()
        with pytest.raises((ValueError, RuntimeError)):
            save_file({"x": found}, tmp_path / "x.safetensors")
        save_file({"x": found.contiguous()}, tmp_path / "x.safetensors")
        assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], source.flip(0))
