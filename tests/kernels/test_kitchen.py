"""comfy-kitchen: an independent implementation of the int4 layer, as oracle on a CPU, and the backend that uses it."""

import pytest
import torch

from svdquant_pack.kernels import stages
from svdquant_pack.kernels.backends import KernelCall, kitchen, reference
from svdquant_pack.kernels.formats import GELU_SHIFT
from svdquant_pack.kernels.packing import sign_extend, unpack
from svdquant_pack.tests.kernels.layers import random_layer

CPU = torch.device("cpu")
BF16 = torch.bfloat16
DTYPES = (torch.bfloat16, torch.float16)
ck = None


@pytest.fixture(autouse=True)
def comfy_kitchen(request):
    """Tests of refusals need no package; the others skip without it."""
    global ck
    if "without" in request.node.name:
        return
    ck = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")


def quantized(x, smooth, down, unsigned):
    shifted = x + GELU_SHIFT if unsigned else x
    qact, ascales, branch_act = ck.quantize_svdquant_w4a4(shifted, smooth, down, act_unsigned=unsigned, lora_x=x)
    return qact[: x.shape[0]].view(torch.int8), ascales[:, : x.shape[0]].contiguous(), branch_act[: x.shape[0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unsigned", [False, True])
def test_both_quantize_alike(dtype, unsigned):
    """It divides in 16 bit where the pack keeps float32: codes near a tie differ, by one."""
    layer = random_layer("int4", act_unsigned=(0, 256) if unsigned else (0, 0), dtype=dtype)
    x = torch.randn(33, 256)
    x = (torch.nn.functional.gelu(x, approximate="tanh") if unsigned else x).to(dtype)
    theirs = quantized(x, layer["smooth_factor"], layer["proj_down"], unsigned)
    channels = layer.spec.act_unsigned
    ours = stages.quantize_activation(x, layer["smooth_factor"], layer["proj_down"], stages.Coding("int4", channels))
    codes = [unpack(side[0]).float() if unsigned else sign_extend(unpack(side[0])).float() for side in (ours, theirs)]
    assert (codes[0] - codes[1]).abs().max() <= 1 and (codes[0] != codes[1]).float().mean() <= 0.03
    torch.testing.assert_close(ours[1].float(), theirs[1].float(), rtol=0.02, atol=0)  # two roundings to bf16
    torch.testing.assert_close(ours[2].float(), theirs[2].float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unsigned", [False, True])
def test_both_multiply_the_same_codes_alike(dtype, unsigned):
    channels = (0, 256) if unsigned else (0, 0)
    layer = random_layer("int4", n=128, act_unsigned=channels, dtype=dtype)
    x, bias = torch.randn(33, 256).abs().to(dtype), torch.randn(128).to(dtype)
    qact, ascales, branch_act = quantized(x, layer["smooth_factor"], layer["proj_down"], unsigned)
    weight = {name: layer[name] for name in ("qweight", "wscales")}
    theirs = ck.scaled_mm_svdquant_w4a4(
        qact, layer["qweight"], ascales, layer["wscales"], branch_act, layer["proj_up"], bias, act_unsigned=unsigned
    )
    fmt = layer.spec.fmt
    act = fmt.decode_activation(unpack(qact), ascales.T, channels).double()
    ours = (
        act @ fmt.decode_weight(weight).double().T + branch_act.double() @ layer["proj_up"].double().T + bias.double()
    )
    error = (theirs.double() - ours).norm() / ours.norm()
    assert error <= {torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]  # its output is rounded, and its branch too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 16, 48])
@pytest.mark.parametrize("lora_rank", [None, 8, 32])
@pytest.mark.parametrize("unsigned", [False, True])
def test_the_backend_is_the_layer(dtype, rank, lora_rank, unsigned):
    """Its arguments in the right order, rows cut off, branches side by side: on its CPU path."""
    channels = (0, 256) if unsigned else (0, 0)
    layer = random_layer("int4", n=128, rank=rank, act_unsigned=channels, dtype=dtype, centred=not unsigned)
    x, bias = torch.randn(33, 256), torch.randn(128).to(dtype)
    x = (torch.nn.functional.gelu(x) if unsigned else x + layer["act_mean"].float()).to(dtype)
    lora = None
    if lora_rank:
        lora = (torch.randn(256, lora_rank) / 16).to(dtype), (torch.randn(128, lora_rank) / 4).to(dtype)
    theirs = kitchen.linear(x, layer, bias, lora, "w4a4")
    ours = reference.linear(x, layer, bias, lora, "w4a4")
    assert theirs.shape == ours.shape and theirs.dtype == dtype
    assert (theirs.double() - ours.double()).norm() <= 0.03 * ours.double().norm()
    assert kitchen.linear(x[:0], layer, bias, lora, "w4a4").shape == (0, 128)


def call(device_type="cuda", capability=(8, 9), **changes) -> KernelCall:
    device = torch.device(device_type)
    values = {"format": "int4", "dtype": BF16, "compute": "w4a4"} | changes
    return KernelCall(device=device, capability=capability, arch=f"sm_{capability[0]}{capability[1]}", **values)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (call(compute="w4a8"), "not w4a8"),
        (call(format="nvfp4"), "of nvfp4"),
        (call(capability=(9, 0)), "up to compute capability 8.9"),
        (call(capability=(7, 5)), "needs 8.0"),
        (call(capability=(12, 0)), "this GPU has 12.0"),
        (call(dtype=torch.float32), "bf16 or fp16"),
        (call(partly_unsigned=True), "signed and unsigned"),
        (call("cpu"), "needs an NVIDIA GPU"),
    ],
)
def test_it_refuses_without_the_package_too(found, reason):
    if found.device.type == "cpu":
        found = KernelCall("int4", CPU, BF16, "w4a4")
    assert reason in kitchen.claims(found)


def test_it_says_why_without_a_gpu():
    """Where the package is missing, or its CUDA kernels are."""
    kitchen.missing.cache_clear()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = kitchen.claims(call())
    assert "not installed" in reason or "CUDA" in reason
