"""The int8 mode of CPUs against the definition, and what it keeps."""

import gc

import pytest
import torch

from svdquant_pack.kernels import FORMATS, Lora, choose, svdquant_linear
from svdquant_pack.kernels.backends import KernelCall, cpu, reference
from svdquant_pack.kernels.layer import from_blob, to_blob
from svdquant_pack.kernels.weight_cache import WeightCache
from svdquant_pack.tests.kernels.layers import random_layer

CPU = torch.device("cpu")
INT8 = [name for name, fmt in FORMATS.items() if torch.int8 in fmt.units]
pytestmark = pytest.mark.skipif(cpu.exact() is not None, reason=str(cpu.exact()))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("format", INT8)
def test_the_layer_is_the_references(format, rows, dtype):
    unsigned = (64, 256) if FORMATS[format].unsigned_act else (0, 0)
    layer = random_layer(format, n=1200, act_unsigned=unsigned, dtype=dtype, centred=True)
    x, bias = torch.randn(rows, 256).to(dtype), torch.randn(1200).to(dtype)
    lora = Lora(torch.randn(256, 40).to(dtype), torch.randn(1200, 40).to(dtype), torch.tensor([0.5, 0.0, -2.0]))
    assert cpu.rows_of(1200) < 300, "in more than one piece"
    for activation in ("", "gelu", "silu"):
        found = cpu.BACKEND.linear(x, layer, bias, lora, "w8a8", activation)
        wanted = reference.linear(x, layer, bias, lora, "w8a8", activation)
        assert found.dtype == dtype and error(found, wanted) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_sums_are_exact_where_float32_is_not():
    """100 * 105 * 4096 takes 26 bits, float32 has 24."""
    layer = random_layer("int4", n=64, k=4096, rank=0)
    layer["qweight"].fill_(0x77)
    layer["wscales"].fill_(1.0)
    weight, _ = cpu.kept_rows(layer)
    codes = torch.randint(100, 127, (3, 4096), dtype=torch.int8)
    wanted = codes.long() @ weight.long().T
    assert wanted.min() > 1 << 24 and torch.equal(torch._int_mm(codes, weight.T).long(), wanted)


@pytest.mark.parametrize("format", INT8)
def test_rows_do_not_depend_on_each_other(format):
    layer, x = random_layer(format), torch.randn(5, 256)
    alone = svdquant_linear(x, layer, compute="w8a8")
    x[1], x[2, 3], x[3] = 0, torch.nan, torch.inf
    found = svdquant_linear(x, layer, compute="w8a8")
    assert torch.equal(found[[0, 4]], alone[[0, 4]])
    assert found[1].abs().max() == 0 and found[2].isnan().all() and found[3].isnan().all()


@pytest.mark.parametrize("shape", [(0, 256), (2, 3, 256)])
def test_shapes_and_strides(shape):
    layer, x = random_layer("int4", n=95), torch.randn(*shape[:-1], 512)[..., ::2]
    before = x.clone()
    assert torch.equal(
        svdquant_linear(x, layer, compute="w8a8"), svdquant_linear(x.contiguous(), layer, compute="w8a8")
    )
    assert torch.equal(x, before), "the activation is only read"


@pytest.mark.parametrize("format", INT8)
def test_one_byte_is_kept_per_weight_as_long_as_the_layer_lives(format, monkeypatch):
    kept = WeightCache(lambda: 1 << 20)
    monkeypatch.setattr(cpu, "ON_CPU", kept)
    layer = random_layer(format)
    blob, views = to_blob(layer.tensors)
    made = []
    monkeypatch.setattr(type(layer.spec.fmt), "expand_rows", _counted(type(layer.spec.fmt).expand_rows, made))
    for _ in range(3):
        svdquant_linear(torch.randn(2, 256), layer.known(layer.spec, from_blob(blob, views)), compute="w8a8")
    assert len(made) == 1 and kept.nbytes == layer.spec.n * layer.spec.k
    del blob
    gc.collect()
    assert kept.nbytes == 0


def _counted(method, calls):
    def counted(*args):
        calls.append(1)
        return method(*args)

    return counted


@pytest.mark.parametrize("format", INT8)
def test_auto_takes_it_and_every_other_call_has_a_reason(format):
    layer = random_layer(format)
    choice = choose(layer.spec, CPU, torch.bfloat16)
    assert (choice.backend.name, choice.compute) == ("cpu", "w8a8")
    for call in (
        KernelCall(format, CPU, torch.bfloat16, "w4a4"),
        KernelCall(format, CPU, torch.float64, "w8a8"),
        KernelCall("awq_w4a16", CPU, torch.bfloat16, "w8a8"),
        KernelCall(format, torch.device("cuda"), torch.bfloat16, "w8a8"),
    ):
        assert isinstance(cpu.claims(call), str)


def test_a_processor_without_the_instructions_stays_with_the_reference(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert "VNNI" in cpu.exact.__wrapped__()
