"""The public operations: what they refuse, how torch.compile sees them, and that they are there once."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdquant_pack import kernels
from svdquant_pack.kernels import eight_bit, ops, stages
from svdquant_pack.kernels.formats import GELU_SHIFT
from svdquant_pack.tests.kernels.layers import random_layer

ROOT = Path(__file__).resolve().parents[2]


def arguments_of_linear(format: str, m: int = 5):
    low_rank = kernels.FORMATS[format].low_rank
    layer = random_layer(format, rank=16 if low_rank else 0, centred=low_rank)
    tensors = [layer.tensors.get(name) for name in layer.spec.fmt.part_names]
    down, up = torch.randn(256, 20), torch.randn(96, 20)
    rest = (torch.randn(96), down, up, torch.ones(2), format, [0, 0], "absmax", 4, "auto", "gelu")
    return torch.randn(m, 256), tensors, *rest


@pytest.mark.parametrize("format", kernels.FORMATS)
def test_fake_tensors_and_schema(format):
    arguments = arguments_of_linear(format)
    checks = ["test_faketensor"]
    if not any(part is not None and part.dtype == torch.float8_e4m3fn for part in arguments[1]):
        checks.append("test_schema")  # it compares copies of the inputs, which torch cannot do in fp8
    torch.library.opcheck(ops.operator.default, arguments, test_utils=checks)


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


def test_shapes_without_data():
    with FakeTensorMode() as mode:
        layer = random_layer("int4")
        fake = kernels.Layer(layer.spec, {name: torch.empty_like(part) for name, part in layer.tensors.items()})
        y = kernels.svdquant_linear(torch.empty(2, 7, 256), fake)
    assert mode is not None and y.shape == (2, 7, 96)


def test_copies_of_the_pack_share_no_operator(tmp_path):
    """Another version in another folder has a format of its own, and the first knows nothing of it."""
    code = f"""
import importlib.util, sys, torch
def load(name, root):
    spec = importlib.util.spec_from_file_location(name, root + "/__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(name + ".kernels")
here, other = load("here", {str(ROOT)!r}), load("other", "pack")
again = load("again", {str(ROOT)!r})
def run(kernels, format):
    weight = kernels.FORMATS[format].encode_weight(torch.eye(64), torch.float32)
    weight["smooth_factor"] = torch.ones(64)
    layer = kernels.Layer(kernels.LayerSpec(format, 64, 64), weight)
    x = torch.ones(2, 64, requires_grad=True)
    kernels.svdquant_linear(x, layer, compute="w16").sum().backward()
    return x.grad
for kernels in (here, other, again):
    assert torch.allclose(run(kernels, "int4"), torch.ones(2, 64)), kernels
run(other, "dummy")
assert "dummy" not in here.FORMATS
names = [getattr(kernels.ops, name).default.name() for kernels in (here, other, again)
         for name in ("operator", "plain_operator", "times_weight")]
assert len(set(names)) == 9, names
assert all("0_1_0" in name for name in names[:3]) and all("9_9" in name for name in names[3:6]), names
assert "triton" not in sys.modules
print(*names[:3])
"""
    copy = tmp_path / "pack"
    copy.mkdir()
    shutil.copy(ROOT / "__init__.py", copy)
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    formats = Path("kernels") / "formats"
    shutil.copy(ROOT / "tests" / "drop_in" / formats / "dummy.py", copy / formats)
    source = copy / "kernels" / "ops.py"
    source.write_text(source.read_text().replace(f'VERSION = "{ops.VERSION}"', 'VERSION = "9.9"'))
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path) for _ in "12"]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout, "a graph compiled in one process is found in the next"


def test_the_version_is_the_packs():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is not None and stated[1] == ops.VERSION


def test_a_layer_on_a_cpu_imports_no_triton(tmp_path):
    code = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("pack", {str(ROOT / "__init__.py")!r})
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
from pack.kernels import FORMATS, Layer, LayerSpec, choose, svdquant_linear
weight = FORMATS["awq_w4a16"].encode_weight(torch.randn(64, 128), torch.bfloat16)
layer = Layer(LayerSpec("awq_w4a16", 64, 128), weight)
svdquant_linear(torch.randn(2, 128), layer)
assert choose(LayerSpec("int4", 64, 64), torch.device("cpu"), torch.bfloat16).backend.name != "triton"
assert "triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compute", ["w4a8", "w8a8", "w4a8-jit", "fp8", "w16"])
def test_the_steps_make_the_layer(compute):
    """Each mode of the reference is the chain of its steps."""
    layer, x = random_layer("int4", n=128, act_unsigned=(64, 128)), torch.randn(9, 256)
    bias, smooth, down, up = torch.randn(128), layer["smooth_factor"], layer["proj_down"], layer["proj_up"]
    y = kernels.svdquant_linear(x, layer, bias, compute=compute)
    branch = x @ down @ up.T + bias
    if compute == "w16":
        shift = torch.zeros(256)
        shift[64:128] = GELU_SHIFT
        wanted = (x + shift) / smooth @ layer.decode_weight().T + branch
    elif compute == "w4a8":
        qact, ascales, _ = stages.quantize_activation(x, smooth, down, stages.Coding("int8_group", (64, 128)))
        wanted = eight_bit.decode_groups(qact, ascales) @ layer.decode_weight().T + branch
    else:
        name, dtype = ("fp8_row", torch.float8_e4m3fn) if compute == "fp8" else ("int8_row", torch.int8)
        qact, ascales, _ = stages.quantize_activation(x, smooth, down, stages.Coding(name, (64, 128)))
        weight, row_scales = layer.spec.fmt.expand_rows(layer.tensors, dtype)
        wanted = (qact.float() @ weight.float().T) * ascales[:, None] * row_scales + branch
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


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
    weight, scales = layer.spec.fmt.expand_rows(layer.tensors)
    difference = (weight.float() * scales[:, None] - layer.decode_weight()).abs()
    assert (difference <= 0.5001 * scales[:, None]).all()


BAD = {
    "x has dtype torch.int64": lambda layer, x: kernels.svdquant_linear(x.long(), layer),
    "x has shape (3, 64)": lambda layer, x: kernels.svdquant_linear(x[:, :64], layer),
    "x is on meta and the layer on cpu": lambda layer, x: kernels.svdquant_linear(x.to("meta"), layer),
    "bias has shape": lambda layer, x: kernels.svdquant_linear(x, layer, torch.zeros(3)),
    "bias has dtype torch.int64": lambda layer, x: kernels.svdquant_linear(x, layer, torch.zeros(96).long()),
    "x is on cpu and bias on meta": lambda layer, x: kernels.svdquant_linear(x, layer, torch.zeros(96, device="meta")),
    "LoRA factors (3, 4)": lambda layer, x: kernels.svdquant_linear(x, layer, lora=lora_of(3, 96)),
    "LoRA factors (256, 4) and (9, 4)": lambda layer, x: kernels.svdquant_linear(x, layer, lora=lora_of(256, 9)),
    "LoRA factors (256, 4) and (96, 5)": lambda layer, x: kernels.svdquant_linear(
        x, layer, lora=(torch.zeros(256, 4), torch.zeros(96, 5))
    ),
    "LoRA factors (256,)": lambda layer, x: kernels.svdquant_linear(x, layer, lora=(torch.zeros(256), torch.zeros(96))),
    "the LoRA has dtype torch.int8": lambda layer, x: kernels.svdquant_linear(
        x, layer, lora=tuple(factor.to(torch.int8) for factor in lora_of(256, 96))
    ),
    "the LoRA on meta": lambda layer, x: kernels.svdquant_linear(
        x, layer, lora=tuple(factor.to("meta") for factor in lora_of(256, 96))
    ),
    "the LoRA's strength has shape (3,)": lambda layer, x: kernels.svdquant_linear(
        x, layer, lora=(*lora_of(256, 96), torch.ones(3))
    ),
    "compute is 'w3a3'": lambda layer, x: kernels.svdquant_linear(x, layer, compute="w3a3"),
    "activation is 'relu'": lambda layer, x: kernels.svdquant_linear(x, layer, activation="relu"),
}


def lora_of(k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(k, 4), torch.zeros(n, 4)


@pytest.mark.parametrize("message", BAD)
def test_bad_input_says_what_is_wrong(message):
    with pytest.raises(ValueError) as caught:
        BAD[message](random_layer("int4"), torch.randn(3, 256))
    assert message in str(caught.value)
