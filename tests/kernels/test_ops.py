"""The public operations: what they refuse, how torch.compile sees them, and that they are there once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdquant_pack import kernels
from svdquant_pack.kernels import eight_bit, ops, stages
from svdquant_pack.kernels.formats import GELU_SHIFT
from svdquant_pack.kernels.packing import unpack
from svdquant_pack.tests.kernels.layers import random_layer

ROOT = Path(__file__).resolve().parents[2]
CODES = ("int4", "nvfp4", "int8_group", "int8_row", "fp8_row")
ARGUMENTS = ("qweight", "wscales")


def arguments_of_linear(format: str, m: int = 5):
    low_rank = format != "awq_w4a16"
    layer = random_layer(format, rank=16 if low_rank else 0, centred=low_rank)
    tensors = [layer.tensors.get(name) for name in ops.TENSORS]
    down, up = torch.randn(256, 20), torch.randn(96, 20)
    rest = (torch.randn(96), down, up, torch.ones(2), format, [0, 0], "absmax", 4, "auto", "gelu")
    return torch.randn(m, 256), *tensors, *rest


def cases():
    """(name, operator, arguments) of every operator."""
    layer, x = random_layer("int4", n=128), torch.randn(5, 256)
    weight = [layer[name] for name in ARGUMENTS]
    branch_act, up, bias = torch.randn(5, 16), layer["proj_up"], torch.randn(128)
    for format in kernels.FORMATS:
        yield f"linear-{format}", ops.linear, arguments_of_linear(format)
    for codes in CODES:
        mean = torch.randn(256) if codes in kernels.FORMATS else None
        arguments = (x, layer["smooth_factor"], layer["proj_down"], mean, codes, [0, 0], "absmax")
        yield f"quantize-{codes}", ops.quantize_activation, arguments
    for codes in ("int4", "int8_group"):
        qact, ascales, _ = stages.quantize_activation(x, None, None, codes, (0, 0))
        arguments = (qact, ascales, *weight, None, None, branch_act, up, bias, "int4", [0, 0], "silu", torch.float32)
        yield f"linear_w4-{codes}", ops.linear_w4, arguments
        arguments = (qact, ascales, *weight, branch_act, up, bias, torch.ones(128), [0, 0], torch.float32)
        yield f"requantize-{codes}", ops.linear_w4_requantize, arguments
    for dtype in (torch.int8, torch.float8_e4m3fn):
        yield f"expand-{dtype}", ops.expand_weight, (*weight, None, None, "int4", dtype)
    qact, ascales = eight_bit.quantize_rows(x)
    rows = eight_bit.expand_rows("int4", layer.tensors)
    yield "linear_w8a8", ops.linear_w8a8, (qact, ascales, *rows, branch_act, up, bias, "", torch.bfloat16)
    awq = random_layer("awq_w4a16")
    weight = [awq[name] for name in ("qweight", "wscales", "wzeros")]
    yield "gemv", ops.gemv_w4a16, (x, *weight, torch.randn(96))


CASES = list(cases())


@pytest.mark.parametrize(("operator", "arguments"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_fake_tensors_and_schema(operator, arguments):
    checks = ["test_faketensor"]
    if not any(torch.is_tensor(part) and part.dtype == torch.float8_e4m3fn for part in arguments):
        checks.append("test_schema")  # it compares copies of the inputs, which torch cannot do in fp8
    torch.library.opcheck(operator.default, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("format", kernels.FORMATS)
def test_compile_sees_one_graph(backend, format):
    layer = random_layer(format)
    bias, lora = torch.randn(96), (torch.randn(256, 8), torch.randn(96, 8))

    def model(x):
        y = kernels.svdquant_linear(x * 2, layer, bias, lora, activation="gelu")
        return kernels.svdquant_linear(y @ torch.ones(96, 256), layer, bias) + 1

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 17, 40):
        x = torch.randn(rows, 256)
        torch.testing.assert_close(compiled(x), model(x))


def test_compile_of_the_single_steps():
    layer = random_layer("int4", n=128)

    def model(x):
        qact, ascales, branch_act = kernels.quantize_activation(x, layer["smooth_factor"], layer["proj_down"])
        return kernels.linear_w4a4(
            qact, ascales, layer["qweight"], layer["wscales"], branch_act, layer["proj_up"], dtype=torch.float32
        )

    x = torch.randn(9, 256)
    torch._dynamo.reset()
    y = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, kernels.svdquant_linear(x, layer, compute="w4a4"), rtol=1e-5, atol=1e-5)


def test_shapes_without_data():
    with FakeTensorMode() as mode:
        layer = random_layer("int4")
        fake = kernels.Layer(layer.spec, {name: torch.empty_like(part) for name, part in layer.tensors.items()})
        y = kernels.svdquant_linear(torch.empty(2, 7, 256), fake)
    assert mode is not None and y.shape == (2, 7, 96)


def test_a_second_copy_of_the_pack_shares_the_operators(tmp_path):
    """It loads, computes and registers nothing twice; one with another schema stands beside."""
    code = f"""
import importlib.util, sys, torch
def load(name):
    spec = importlib.util.spec_from_file_location(name, {str(ROOT / "__init__.py")!r})
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(name + ".kernels.ops")
one, two = load("first"), load("second")
assert one.linear is two.linear
other = two.register("linear", "(Tensor x) -> Tensor", lambda x: x + 1, lambda x: torch.empty_like(x))
assert other is not one.linear and other(torch.zeros(1)).item() == 1
assert two.register("linear", "(Tensor x) -> Tensor", None, None) is other
assert "triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_layer_on_a_cpu_imports_no_triton(tmp_path):
    code = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("pack", {str(ROOT / "__init__.py")!r})
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
from pack.kernels import Layer, LayerSpec, choose, svdquant_linear
from pack.kernels.formats.awq_w4a16 import encode_weight
layer = Layer(LayerSpec("awq_w4a16", 64, 128), encode_weight(torch.randn(64, 128), torch.bfloat16))
svdquant_linear(torch.randn(2, 128), layer)
assert choose("int4", torch.device("cpu"), torch.bfloat16).backend.name == "reference"
assert "triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compute", ["w4a8", "w8a8", "w4a8-jit", "fp8", "w16"])
def test_the_steps_make_the_layer(compute):
    """Each mode of the reference is the chain of its public steps."""
    layer, x = random_layer("int4", n=128, act_unsigned=(64, 128)), torch.randn(9, 256)
    bias, smooth, down, up = torch.randn(128), layer["smooth_factor"], layer["proj_down"], layer["proj_up"]
    y = kernels.svdquant_linear(x, layer, bias, compute=compute)
    if compute == "w16":
        shift = torch.zeros(256)
        shift[64:128] = GELU_SHIFT
        wanted = (x + shift) / smooth @ layer.decode_weight().T + x @ down @ up.T + bias
    elif compute == "w4a8":
        codes = kernels.quantize_activation(x, smooth, down, codes="int8_group", act_unsigned=(64, 128))
        weight = layer["qweight"], layer["wscales"]
        wanted = kernels.linear_w4a8(*codes[:2], *weight, codes[2], up, bias, dtype=torch.float32)
    else:
        name, dtype = ("fp8_row", torch.float8_e4m3fn) if compute == "fp8" else ("int8_row", torch.int8)
        codes = kernels.quantize_activation(x, smooth, down, codes=name, act_unsigned=(64, 128))
        rows = kernels.expand_weight(layer["qweight"], layer["wscales"], dtype=dtype)
        if compute == "fp8":
            wanted = (codes[0].float() @ rows[0].float().T) * codes[1][:, None] * rows[1] + codes[2] @ up.T + bias
        else:
            wanted = kernels.linear_w8a8(*codes[:2], *rows, codes[2], up, bias, dtype=torch.float32)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


def test_requantized_output_is_what_the_next_layer_would_make():
    layer, smooth = random_layer("int4", n=128), torch.rand(128) + 0.5
    qact, ascales, branch_act = kernels.quantize_activation(torch.randn(9, 256), None, layer["proj_down"])
    y, codes, scales = kernels.linear_w4_requantize(
        qact, ascales, layer["qweight"], layer["wscales"], smooth, branch_act, layer["proj_up"]
    )
    assert y.dtype == torch.bfloat16 and y.min() > -GELU_SHIFT and unpack(codes).max() == 15
    wanted = kernels.quantize_activation(y, smooth, act_unsigned=(0, 128))
    assert torch.equal(codes, wanted[0]) and torch.equal(scales, wanted[1])


@pytest.mark.parametrize("order", [eight_bit.split_order, eight_bit.natural_order])
def test_the_order_of_group_codes_has_an_inverse(order):
    inverse = {eight_bit.split_order: eight_bit.natural_order, eight_bit.natural_order: eight_bit.split_order}[order]
    codes = torch.arange(256, dtype=torch.int16).repeat(3, 1)
    assert torch.equal(inverse(order(codes)), codes) and not torch.equal(order(codes), codes)
    assert eight_bit.split_order(codes)[0, :3].tolist() == [0, 2, 4]
    assert eight_bit.split_order(codes)[0, 32:35].tolist() == [1, 3, 5]


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_expanded_rows_are_the_weight(format):
    """At most half a step of the row away: 1/30 (1/40) of its largest group scale."""
    layer = random_layer(format)
    weight, scales = kernels.expand_weight(
        layer["qweight"], layer["wscales"], layer.tensors.get("wtscale"), format=format
    )
    difference = (weight.float() * scales[:, None] - layer.decode_weight()).abs()
    assert (difference <= 0.5001 * scales[:, None]).all()


BAD = {
    "x has dtype": lambda layer, x: kernels.svdquant_linear(x.int(), layer),
    "this int4 layer needs": lambda layer, x: kernels.svdquant_linear(x[:, :64], layer),
    "bias has shape": lambda layer, x: kernels.svdquant_linear(x, layer, torch.zeros(3)),
    "x is on cpu and bias on meta": lambda layer, x: kernels.svdquant_linear(x, layer, torch.zeros(96, device="meta")),
    "LoRA factors": lambda layer, x: kernels.svdquant_linear(x, layer, lora=(torch.zeros(3, 4), torch.zeros(96, 4))),
    "x is on meta and the layer on cpu": lambda layer, x: kernels.svdquant_linear(x.to("meta"), layer),
    "lora_strength has shape": lambda layer, x: kernels.svdquant_linear(
        x, layer, lora=(torch.zeros(256, 32), torch.zeros(96, 32)), lora_strength=torch.ones(3)
    ),
    "activation is 'relu'": lambda layer, x: kernels.svdquant_linear(x, layer, activation="relu"),
    "compute is 'w3a3'": lambda layer, x: kernels.svdquant_linear(x, layer, compute="w3a3"),
    "codes is 'int5'": lambda layer, x: kernels.quantize_activation(x, codes="int5"),
    "is not a multiple of the int4 group": lambda layer, x: kernels.quantize_activation(x[:, :100]),
    "smooth_factor has shape": lambda layer, x: kernels.quantize_activation(x, torch.ones(3)),
    "proj_down has shape": lambda layer, x: kernels.quantize_activation(x, None, torch.ones(3, 16)),
    "must be whole groups of 64": lambda layer, x: kernels.quantize_activation(x, act_unsigned=(0, 100)),
    "act_rule is 'four_six'": lambda layer, x: kernels.quantize_activation(x, act_rule="four_six"),
    "does not fit weight": lambda layer, x: kernels.linear_w4a4(
        torch.zeros(3, 7, dtype=torch.int8), x, layer["qweight"], layer["wscales"]
    ),
    "belong together": lambda layer, x: kernels.linear_w4a4(
        torch.zeros(3, 128, dtype=torch.int8), x, layer["qweight"], layer["wscales"], x
    ),
    "format is 'awq_w4a16'": lambda layer, x: kernels.expand_weight(
        layer["qweight"], layer["wscales"], format="awq_w4a16"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_says_what_is_wrong(message):
    with pytest.raises(ValueError) as caught:
        BAD[message](random_layer("int4"), torch.randn(3, 256))
    assert message in str(caught.value)
