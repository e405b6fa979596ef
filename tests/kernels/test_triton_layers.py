"""Whole layers through Triton, as a model calls them, against the reference."""

import pytest
import torch

from svdquant_pack.kernels import Layer, LayerSpec, Lora, choose, svdquant_linear
from svdquant_pack.kernels.backends.reference import linear as reference
from svdquant_pack.quantize.linear import PackedLinear
from svdquant_pack.tests.kernels.layers import random_layer

triton_layers = pytest.importorskip("svdquant_pack.kernels.backends.triton.layers")
from svdquant_pack.kernels.backends import KernelCall  # noqa: E402 (only where Triton is)
from svdquant_pack.kernels.backends.triton import BACKEND, claims  # noqa: E402

MODES = {"int4": ("w4a4", "w4a8", "w8a8", "w4a8-jit", "w16"), "nvfp4": ("w4a4", "w8a8", "w4a8-jit", "w16")}
CASES = [(format, compute) for format, computes in MODES.items() for compute in computes]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-3}  # y's rounding, and codes on a tie


def on(device: torch.device, layer: Layer) -> Layer:
    return layer.to(device)


def need(format: str, compute: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else None
    claim = claims(KernelCall(format, device, dtype, compute, capability))
    if isinstance(claim, str):
        pytest.skip(claim)


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    error = (found.cpu().double() - wanted.double()).norm() / wanted.double().norm()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize(("format", "compute"), CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_layer_in_every_mode(format, compute, dtype, device):
    need(format, compute, device, dtype)
    channels = (64, 192) if format == "int4" else (0, 0)
    layer = random_layer(format, rank=32, act_unsigned=channels, dtype=dtype, centred=True)
    x, bias = (torch.randn(33, 256) + layer["act_mean"].float()).to(dtype), torch.randn(96).to(dtype)
    lora = torch.randn(256, 24).to(dtype) / 16, torch.randn(96, 24).to(dtype) / 5
    lora = Lora(*lora, torch.tensor([1.5, -0.5]))
    wanted = reference(x, layer, bias, lora, compute, "gelu")
    moved = Lora(*(factor.to(device) for factor in lora))
    y = BACKEND.linear(x.to(device), on(device, layer), bias.to(device), moved, compute, "gelu")
    close(y, wanted, dtype)


@pytest.mark.parametrize(("format", "compute"), CASES)
@pytest.mark.parametrize("width", [512, 528, 800])
def test_a_lora_of_any_width(format, compute, width, device):
    need(format, compute, device)
    layer, x = random_layer(format, rank=32, dtype=torch.bfloat16), torch.randn(17, 256).bfloat16()
    lora = tuple(torch.randn(size, width).bfloat16() / size**0.5 for size in (256, 96))
    lora = Lora(*lora, torch.linspace(-1, 1, width // 16))
    wanted = reference(x, layer, None, lora, compute)
    without = reference(x, layer, None, None, compute)
    moved = Lora(*(factor.to(device) for factor in lora))
    y = BACKEND.linear(x.to(device), on(device, layer), None, moved, compute)
    close(y.cpu() - without, wanted.float() - without.float(), torch.bfloat16)


def test_a_strength_is_not_rounded_to_the_activation(device):
    """Where no kernel takes the strength, the product alone is rounded."""
    x, down = torch.randn(9, 64).bfloat16().to(device), torch.randn(64, 40).bfloat16().to(device)
    strength, act = torch.tensor([0.7, -1.3, 0.1]).to(device), x.new_empty(9, 56)
    triton_layers.launch.columns_by_torch(x, act, None, Lora(down, down, strength))
    assert torch.equal(act[:, 16:], ((x @ down).float() * strength.repeat_interleave(16)[:40]).bfloat16())


@pytest.mark.parametrize(("format", "compute"), [*CASES, ("awq_w4a16", "w4a16"), ("awq_w4a16", "w16")])
def test_nothing_but_the_weight(format, compute, device):
    need(format, compute, device)
    layer, x = random_layer(format, rank=0, dtype=torch.bfloat16), torch.randn(5, 256).bfloat16()
    y = BACKEND.linear(x.to(device), on(device, layer), None, None, compute)
    close(y, reference(x, layer, None, None, compute), torch.bfloat16)
    empty = BACKEND.linear(x[:0].to(device), on(device, layer), None, None, compute)
    assert empty.shape == (0, 96)


@pytest.mark.parametrize("format", MODES)
def test_kept_and_fresh_expansion_are_bit_identical(format, device):
    layer = on(device, random_layer(format, rank=16, dtype=torch.bfloat16))
    x = torch.randn(21, 256).bfloat16().to(device)
    kept = [BACKEND.linear(x, layer, None, None, "w8a8") for _ in range(2)]
    fresh = BACKEND.linear(x, layer, None, None, "w4a8-jit")
    assert torch.equal(kept[0], fresh) and torch.equal(kept[1], fresh)
    layer["qweight"].zero_()  # a host that overwrites the bytes gets the new weight
    assert torch.equal(BACKEND.linear(x, layer, None, None, "w8a8"), BACKEND.linear(x, layer, None, None, "w4a8-jit"))


@pytest.mark.parametrize(("format", "compute"), CASES)
def test_nan_reaches_its_row_alone(format, compute, device):
    need(format, compute, device)
    layer, x = on(device, random_layer(format, dtype=torch.bfloat16)), torch.randn(9, 256).bfloat16()
    x[4, 100] = torch.nan
    y = svdquant_linear(x.to(device), layer, compute=compute).cpu()
    assert y[4].isnan().all() and not y[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 5), (0,), (2, 0)])
def test_leading_dimensions_and_strides(leading, device):
    layer = on(device, random_layer("int4", dtype=torch.bfloat16))
    wide = torch.randn(*leading, 512).bfloat16().to(device)
    found = svdquant_linear(wide[..., ::2], layer, compute="w4a8")
    assert found.shape == (*leading, 96)
    assert torch.equal(found, svdquant_linear(wide[..., ::2].contiguous(), layer, compute="w4a8"))


@pytest.mark.parametrize("kind", ["plain", "outliers", "gelu"])
def test_8_bit_modes_are_closer_to_16_bit_than_w4a4(kind, device):
    """At most 0.95 of w4a4's error, on the layers for which 4-bit activations are hard and easy."""
    layer = on(device, random_layer("int4", n=64, k=256, rank=32))
    x = torch.randn(64, 256)
    if kind == "outliers":
        x = x * torch.where(torch.arange(256) % 37 == 0, 20.0, 1.0)
    elif kind == "gelu":
        x = torch.nn.functional.gelu(x)
    exact = x.to(device) @ layer.dense_weight().T
    # all of them share the rounding of the weight, which is not their error: the layer's own matrix is the yardstick
    error = {
        compute: (BACKEND.linear(x.to(device), layer, None, None, compute) - exact).norm().item()
        for compute in ("w4a4", "w4a8", "w4a8-jit")
    }
    assert error["w4a8"] <= 0.95 * error["w4a4"] and error["w4a8-jit"] <= 0.95 * error["w4a4"]


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second element of a wider tensor."""
    return torch.stack((tensor, torch.zeros_like(tensor)), -1).flatten(-2)[..., ::2] if tensor.dim() else tensor


@pytest.mark.parametrize("format", MODES)
def test_tensors_that_are_not_contiguous_give_the_same(format, device):
    """600 rows: the branch is computed by the quantizing kernel itself."""
    layer, x = on(device, random_layer(format, rank=32, dtype=torch.bfloat16)), torch.randn(600, 256).bfloat16()
    x, lora = x.to(device), (torch.randn(256, 16).to(device), torch.randn(96, 16).to(device))
    apart = Layer(layer.spec, {name: strided(tensor) for name, tensor in layer.tensors.items()})
    assert not apart["proj_down"].is_contiguous() and not apart["qweight"].is_contiguous()
    found = svdquant_linear(strided(x), apart, None, tuple(map(strided, lora)), "w4a8-jit")
    assert torch.equal(found, svdquant_linear(x, layer, None, lora, "w4a8-jit"))


def test_triton_is_chosen_where_it_runs(device):
    assert choose(LayerSpec("int4", 64, 64), device, torch.bfloat16, "w4a8").backend.name == "triton"
    assert choose(LayerSpec("awq_w4a16", 64, 64), device, torch.bfloat16, rows=1).compute == "w4a16"


@pytest.mark.parametrize(("format", "compute"), CASES)
@pytest.mark.parametrize("k", [256, 192])
def test_a_packed_layer_is_the_layer(format, compute, k, device):
    """Packing may move numbers in memory, for the kernels alone."""
    need(format, compute, device)
    layer, x = random_layer(format, k=k, rank=32, dtype=torch.bfloat16), torch.randn(17, k).bfloat16().to(device)
    blob, packed = PackedLinear.pack(layer, compute)
    blob = blob.to(device)
    assert torch.equal(packed.forward(x, blob, None, None), svdquant_linear(x, on(device, layer), compute=compute))
    for name, tensor in packed.layer(blob).tensors.items():
        assert torch.equal(tensor.cpu().float(), layer[name].float()), name


@pytest.mark.parametrize("n", [37, 38, 130])
def test_scales_that_do_not_come_in_pairs_or_fill_no_tile(n, device):
    need("int4", "w4a8", device)
    layer, x = random_layer("int4", n=n, dtype=torch.bfloat16), torch.randn(17, 256).bfloat16()
    y = BACKEND.linear(x.to(device), on(device, layer), None, None, "w4a8")
    close(y, reference(x, layer, None, None, "w4a8"), torch.bfloat16)
