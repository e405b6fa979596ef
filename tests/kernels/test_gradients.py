"""Gradients through a 4-bit layer are those of the dense layer of its weight, straight through the rounding."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from svdquant_pack import kernels
from svdquant_pack.kernels import ops, stages
from svdquant_pack.kernels.layer import Lora
from svdquant_pack.quantize.linear import PackedLinear
from svdquant_pack.quantize.lora.deltas import Columns, Kron
from svdquant_pack.quantize.lora.loras import LayerLoras
from svdquant_pack.tests.kernels.layers import random_layer

CASES = [(format, compute) for format in kernels.FORMATS for compute in kernels.computes_of(format)]


def layer_of(format: str):
    if not kernels.FORMATS[format].low_rank:
        return random_layer(format)
    unsigned = (64, 128) if kernels.FORMATS[format].unsigned_act else (0, 0)
    return random_layer(format, act_unsigned=unsigned, centred=True)


def inputs_of(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, bias, down, up, strength: all of them want a gradient"""
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 7, 256), (96,), (256, 20), (96, 20))
    x, bias, down, up = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    leaves = [x, bias, down / 16, up / 4, torch.tensor([0.5, 2.0])]
    return [leaf.requires_grad_() for leaf in leaves]


def dense(layer, x, bias, down, up, strength):
    """The same layer of its dense weight, in plain torch."""
    weight, bias = layer.dense_weight().to(x.dtype), layer.unshifted_bias(bias).to(x.dtype)
    return x @ weight.T + bias + stages.low_rank(x @ down, up, strength)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("activation", ["", "gelu", "silu"])
@pytest.mark.parametrize(("format", "compute"), CASES)
def test_the_gradient_is_that_of_the_dense_layer(format, compute, activation):
    """Behind an activation function the derivative is taken where the layer's own sum lies."""
    layer, leaves = layer_of(format), inputs_of()
    x, bias, *lora = leaves
    y = kernels.svdquant_linear(x, layer, bias, Lora(*lora), compute, activation)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(y, leaves, dy)

    plain = dense(layer, *leaves)
    with torch.no_grad():
        at = kernels.svdquant_linear(x, layer, bias, Lora(*lora), compute).requires_grad_()
    if activation:
        dy = torch.autograd.grad(stages.activate(at, activation), at, dy)[0]
    wanted = torch.autograd.grad(plain, leaves, dy)
    assert cosine_similarity(found[0].flatten(), wanted[0].flatten(), dim=0) > 0.9999
    for mine, plains in zip(found, wanted, strict=True):
        assert relative(mine, plains) < 1e-3  # measured: below 1e-6
    if compute == "w16":
        assert relative(y, stages.activate(plain, activation)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", kernels.FORMATS)
def test_sixteen_bit_gradients(format, dtype):
    layer, leaves = layer_of(format), inputs_of(dtype)
    found = torch.autograd.grad(kernels.svdquant_linear(leaves[0], layer, leaves[1], Lora(*leaves[2:])).sum(), leaves)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    wanted = torch.autograd.grad(dense(layer, *wide).sum(), wide)
    for leaf, mine, plains in zip(leaves, found, wanted, strict=True):
        assert mine.dtype == leaf.dtype and relative(mine.float(), plains) < 0.01  # two roundings to 8 bits


@pytest.mark.parametrize("activation", ["", "gelu", "silu"])
@pytest.mark.parametrize("format", kernels.FORMATS)
def test_finite_differences(format, activation):
    """w16 rounds nothing in float64: its first and second derivatives are those of its values."""
    layer = layer_of(format)
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs_of()]
    leaves[0] = leaves[0].detach()[:1, :2].clone().requires_grad_()

    def run(x, bias, down, up, strength):
        return kernels.svdquant_linear(x, layer, bias, Lora(down, up, strength), "w16", activation)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_only_what_wants_a_gradient_gets_one():
    layer, (x, bias, down, up, _) = layer_of("int4"), inputs_of()
    for wanted in (x, bias, down, up):
        given = [leaf if leaf is wanted else leaf.detach() for leaf in (x, bias, down, up)]
        y = kernels.svdquant_linear(given[0], layer, given[1], Lora(*given[2:]))
        assert torch.autograd.grad(y.sum(), wanted)[0].isfinite().all()
        with torch.no_grad():
            assert not kernels.svdquant_linear(given[0], layer, given[1], Lora(*given[2:])).requires_grad
    empty = torch.empty(0, 256, requires_grad=True)
    assert torch.autograd.grad(kernels.svdquant_linear(empty, layer).sum(), empty)[0].shape == (0, 256)


@pytest.mark.parametrize("activation", ["", "gelu"])
def test_tensors_of_inference_mode_may_stand_beside_what_is_trained(activation):
    """As a server gives them, which loads a model in it; through first and second derivatives."""
    normal, (x, bias, down, up, strength) = layer_of("int4"), inputs_of()
    with torch.inference_mode():
        layer = kernels.Layer(normal.spec, {name: tensor.clone() for name, tensor in normal.tensors.items()})
        given = [leaf.clone() for leaf in (bias, up, strength)]
    results = []
    for each, (b, u, s) in ((normal, (bias, up, strength)), (layer, given)):
        y = kernels.svdquant_linear(x, each, b, Lora(down, u, s), "w16", activation)
        first = torch.autograd.grad(y.square().sum(), (x, down), create_graph=True)
        results.append((*first, *torch.autograd.grad(first[0].square().sum(), (x, down))))
    for wanted, found in zip(*results, strict=True):
        assert torch.equal(wanted, found)


def test_loras_that_were_placed_in_inference_mode_are_placed_anew():
    """Those made outside it take gradients, from tensors of it too."""
    layer = random_layer("int4")
    _, packed = PackedLinear.pack(layer, "w16")
    device, dtype = torch.device("cpu"), torch.float32
    with torch.inference_mode():
        blob, _ = PackedLinear.pack(layer, "w16")
        kron = Kron(torch.ones(4, 8), (torch.ones(24, 32),), (0, 96), (0, 256))
        loras = LayerLoras((Columns(torch.ones(256, 16), torch.ones(96, 16)), kron), (0.5, 0.5), rows=torch.ones(96))
        earlier = loras.on(device, dtype)
        assert earlier.fits(loras)
    assert not earlier.fits(loras)
    loaded = loras.on(device, dtype)
    assert loaded.fits(loras)
    x = torch.randn(3, 256, requires_grad=True)
    dx = torch.autograd.grad(loaded.forward(packed, x, blob, None).sum(), x)[0]
    assert relative(dx, loras.dense_weight(layer.dense_weight()).sum(0).expand(3, -1)) < 1e-5


def test_a_layers_own_tensors_have_none_and_say_so():
    layer = random_layer("int4")
    layer["proj_up"].requires_grad_()
    with pytest.raises(ValueError, match="proj_up of int4 at N=96, K=256, rank 16 requires a gradient"):
        kernels.svdquant_linear(torch.randn(3, 256), layer)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("format", kernels.FORMATS)
def test_a_compiled_step_has_the_same_gradients(format, backend):
    layer, leaves = layer_of(format), inputs_of()
    x, bias, *lora = leaves

    def loss(x):
        y = kernels.svdquant_linear(x * 2, layer, bias, Lora(*lora), activation="gelu")
        return kernels.svdquant_linear(y @ torch.ones(96, 256), layer, bias).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
    for rows in (2, 1):
        for mine, plains in zip(
            torch.autograd.grad(compiled(x[:rows]), leaves), torch.autograd.grad(loss(x[:rows]), leaves), strict=True
        ):
            torch.testing.assert_close(mine, plains)


@pytest.mark.parametrize("format", kernels.FORMATS)
def test_torchs_own_checks_of_the_operators(format):
    layer, (x, bias, *lora) = layer_of(format), inputs_of()
    parts = [layer.tensors.get(name) for name in layer.spec.fmt.part_names]
    rest = (format, list(layer.spec.act_unsigned), "absmax", 4, "w16", "gelu")
    checks = ["test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(ops.operator.default, (x[0], parts, bias, *lora, *rest), test_utils=checks)
    for transposed in (False, True):
        z = torch.randn(5, 256 if transposed else 96, requires_grad=True)
        torch.library.opcheck(ops.times_weight.default, (z, parts, format, transposed), test_utils=checks)


@pytest.mark.parametrize("vectors", [(), ("rows",), ("cols",), ("rows", "cols", "shift")])
def test_loras_of_every_form_are_exact(vectors):
    """Columns, a Kronecker product of a part of the layer, and DoRA's factors, all of them trained."""
    layer, generator = layer_of("int4"), torch.Generator().manual_seed(3)
    blob, packed = PackedLinear.pack(layer, "w16")

    def leaf(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / 8).requires_grad_()

    columns = Columns(leaf(256, 16), leaf(96, 16))
    kron = Kron(leaf(4, 8), (leaf(12, 4), leaf(4, 16)), (32, 48), (64, 128), leaf(48), leaf(128))
    x, bias = torch.randn(3, 256, generator=generator).requires_grad_(), leaf(96)
    scale = {name: leaf(256 if name == "cols" else 96) for name in vectors}
    if "shift" in scale:
        plain = torch.zeros(96)
        scale["shift"] = layer.unshifted_bias(plain) - plain
    loras = LayerLoras((columns, kron), (0.7, -1.3), **scale)
    trained = [x, bias, columns.down, columns.up, *kron.tensors, *(scale[name] for name in vectors if name != "shift")]

    y = loras.on(x.device, x.dtype).forward(packed, x, blob, bias)
    weight = loras.dense_weight(layer.dense_weight())
    wanted = x @ weight.T + layer.unshifted_bias(bias)
    if "rows" in scale and "shift" not in scale:  # without it the bias of an unsigned layer is taken as it is stored
        wanted = wanted + (scale["rows"] - 1) * (layer.unshifted_bias(bias) - bias)
    assert relative(y, wanted) < 1e-5
    for mine, plains in zip(
        torch.autograd.grad(y.square().sum(), trained), torch.autograd.grad(wanted.square().sum(), trained), strict=True
    ):
        assert relative(mine, plains) < 1e-4
