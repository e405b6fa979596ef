"""The Gluon kernels on a real GPU, for the first run on one: `python -m pytest -q tests/kernels/test_gpu_gluon.py`.

From sm_90 on the INT4 instruction is a slow subroutine with the same result, so that any NVIDIA GPU from Turing on can
check the numbers of int4_mma; int8_async needs a Hopper.
"""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="needs a triton with Gluon")

from svdquant_pack.kernels import Layer, Lora, svdquant_linear
from svdquant_pack.kernels.backends import KernelCall
from svdquant_pack.kernels.backends import gluon as backend
from svdquant_pack.kernels.backends.gluon import int4_linear, int8_async, int8_linear
from svdquant_pack.kernels.backends.gluon.low_rank import LowRank
from svdquant_pack.kernels.backends.reference import linear as reference_linear
from svdquant_pack.kernels.dispatch import fault_of
from svdquant_pack.kernels.packing import pack
from svdquant_pack.kernels.stages import CodedActivation
from svdquant_pack.tests.kernels.layers import RowSteps, random_layer

GPU = torch.cuda.is_available() and torch.version.hip is None
CAPABILITY = torch.cuda.get_device_capability() if GPU else (0, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")]
DTYPES = [torch.float16] if CAPABILITY == (7, 5) else [torch.float16, torch.bfloat16]
with_int4 = pytest.mark.skipif(CAPABILITY < (7, 5), reason="needs compute capability 7.5")
hopper = pytest.mark.skipif(CAPABILITY != (9, 0), reason="needs compute capability 9.0")
ROWS = [1, 16, 17, 63, 333, 1024]


def there(layer: Layer) -> Layer:
    return Layer(layer.spec, {name: tensor.cuda() for name, tensor in layer.tensors.items()})


def int4(*call) -> torch.Tensor:
    return int4_linear.prepare(*call, "")(*call)


def int8(*call) -> torch.Tensor:
    return int8_linear.prepare(*call, "", RowSteps)(*call)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.cpu().double() - wanted.double()).norm() / wanted.double().norm()).item()


@with_int4
@pytest.mark.parametrize("n", [200, 256], ids=["natural", "in order"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_unsigned", [(0, 0), (0, 384), (128, 384), (64, 192)], ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_int4_layer_agrees_with_the_reference(m, act_unsigned, dtype, n):
    layer = random_layer("int4", n, 384, 32, act_unsigned, dtype, centred=True)
    generator = torch.Generator().manual_seed(m)
    x, bias = torch.randn(m, 384, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)
    lora = torch.randn(384, 8, generator=generator) / 20, torch.randn(n, 8, generator=generator)
    device = there(layer).in_order("fragments")
    y = int4(x.cuda(), device, bias.cuda(), Lora(*(factor.cuda() for factor in lora)))
    # rounding of the branch between its factors and of the result: a few units of the last place
    assert relative(y, reference_linear(x, layer, bias, lora, "w4a4")) < 4 * torch.finfo(dtype).eps


@with_int4
def test_int4_integer_sums_are_exact():
    """Scales of one: every product is a whole number, and below 2048 half precision holds it."""
    generator = torch.Generator().manual_seed(1)
    codes, weight = (torch.randint(-2, 3, (rows, 256), generator=generator) for rows in (129, 72))
    ones = torch.ones(4, 129, dtype=torch.float16), torch.ones(4, 72, dtype=torch.float16)
    out = torch.empty(129, 72, dtype=torch.float16, device="cuda")
    act = CodedActivation(pack(codes).cuda(), ones[0].cuda())
    int4_linear.int4_gemm(act, int4_linear.in_fragments(pack(weight).cuda(), ones[1].cuda()), None, None, out)
    assert torch.equal(out.cpu(), (codes @ weight.T).half())


@with_int4
def test_nan_stays_in_its_row():
    layer = random_layer("int4", 64, 128, 16, dtype=torch.float16)
    x = torch.ones(40, 128, dtype=torch.float16)
    x[3, 70] = torch.nan
    y = int4(x.cuda(), there(layer), None, None)
    assert y[3].isnan().all() and y.isnan().any(1).sum() == 1


@hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(512, 1024), (200, 784), (3072, 3072)])
@pytest.mark.parametrize("m", [*ROWS, 4608])
def test_int8_product_is_exact_up_to_rounding(m, n, k, dtype):
    generator = torch.Generator(device="cuda").manual_seed(m)

    def codes(rows: int) -> torch.Tensor:
        return torch.randint(-127, 128, (rows, k), generator=generator, device="cuda", dtype=torch.int8)

    def floats(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device="cuda")

    a8, w8 = codes(m), codes(n)
    a_scale, w_scale = floats(m), floats(n)
    low_rank, bias = LowRank(floats(m, 48).to(dtype), floats(n, 48).to(dtype)), floats(n).to(dtype)
    wanted = (a8.double() @ w8.double().T) * a_scale[:, None] * w_scale
    added = low_rank.act.double() @ low_rank.up.double().T
    for factors in (None, low_rank):
        out = torch.empty(m, n, dtype=dtype, device="cuda")
        for _ in range(3):  # a race need not show the first time
            int8_async.int8_gemm(CodedActivation(a8, a_scale), w8, w_scale, factors, bias, out.fill_(torch.nan))
            exact = wanted + bias.double() + (0 if factors is None else added)
            assert relative(out, exact.cpu()) < torch.finfo(dtype).eps


@hopper
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_int8_layer_agrees_with_the_reference(format):
    layer = random_layer(format, 512, 384, 32, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    x, bias = torch.randn(333, 384, generator=generator).bfloat16(), torch.randn(512, generator=generator)
    y = int8(x.cuda(), there(layer), bias.cuda(), None)
    assert relative(y, reference_linear(x, layer, bias, None, "w4a8-jit")) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("compute", ["w4a4", "w4a8-jit"])
def test_where_it_is_not_refused_the_self_test_passes(compute):
    device, dtype = torch.device("cuda", torch.cuda.current_device()), DTYPES[-1]
    call = KernelCall("int4", device, dtype, compute, CAPABILITY)
    if isinstance(claim := backend.claims(call), str):
        pytest.skip(claim)
    assert fault_of(backend.BACKEND, call) is None
    layer = random_layer("int4", 512, 384, 32, dtype=dtype)
    x = torch.randn(1024, 384, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = svdquant_linear(x.cuda(), there(layer), compute=compute)
    assert relative(y, reference_linear(x, layer, None, None, compute)) < 0.01
