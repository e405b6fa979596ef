"""torch._scaled_mm as a backend: fp8 for real on a CPU; NVFP4's operands against the layout that cuBLASLt documents."""

from collections.abc import Iterator

import pytest
import torch

from svdquant_pack.kernels import FORMATS, Layer, Lora, dispatch
from svdquant_pack.kernels.backends import KernelCall, cublas, discover, reference
from svdquant_pack.kernels.formats import E2M1_CODE
from svdquant_pack.kernels.layer import from_blob, to_blob
from svdquant_pack.kernels.packing import unpack
from svdquant_pack.kernels.self_test import TOLERANCE, self_test
from svdquant_pack.tests.kernels.layers import random_layer

ROUNDINGS = 0.01  # product, branch, LoRA and bias are rounded to 16 bit one after the other
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16
FP8 = [name for name, fmt in FORMATS.items() if torch.float8_e4m3fn in fmt.units]
NVFP4 = [name for name, fmt in FORMATS.items() if fmt.code == E2M1_CODE]
on_this_cpu = pytest.mark.skipif(cublas.on_cpu() is not None, reason=str(cublas.on_cpu()))
with_fp4 = pytest.mark.skipif(not hasattr(torch, cublas.FP4), reason=f"this torch has no {cublas.FP4}")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def measured(format: str, device: torch.device, compute: str, asked: bool = False, **more) -> KernelCall:
    return KernelCall(format, device, more.pop("dtype", BF16), compute, asked=asked, measured=True, **more)


# -- when it runs


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("compute", ["w4a4", "fp8"])
@pytest.mark.parametrize("format", FORMATS)
def test_no_table_chooses_it(format, compute, asked):
    call = KernelCall(format, GPU, BF16, compute, (10, 0), "sm_100", asked=asked)
    assert "where it was measured to be the fastest" in cublas.claims(call)


@pytest.mark.parametrize(
    ("format", "compute", "capability", "why"),
    [
        ("nvfp4", "w4a4", (10, 0), None),
        ("nvfp4", "w4a4", (12, 0), None),
        ("nvfp4", "w4a4", (9, 0), "need compute capability 10.x or 12.x, this is sm_90"),
        ("nvfp4", "w4a4", (11, 0), "need compute capability"),
        ("nvfp4", "w4a4", None, "need compute capability"),
        ("nvfp4", "fp8", (8, 9), None),
        ("int4", "fp8", (10, 3), None),
        ("int4", "fp8", (8, 6), "compute capability 8.9 to 10.3"),
        ("int4", "fp8", (12, 0), "compute capability 8.9 to 10.3"),
        ("int4", "w4a4", (10, 0), "not w4a4 of int4"),
        ("nvfp4", "w16", (10, 0), "not w16 of nvfp4"),
        ("awq_w4a16", "fp8", (10, 0), "not fp8 of awq_w4a16"),
    ],
)
def test_which_gpus_it_is_for(format, compute, capability, why, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch, cublas.FP4, torch.int8, raising=False)
    monkeypatch.setattr(cublas.versions, "missing", lambda: "Triton is not installed")
    arch = "gfx942" if capability is None else f"sm_{capability[0]}{capability[1]}"
    found = cublas.claims(measured(format, GPU, compute, capability=capability, arch=arch))
    assert found == cublas.CLAIM if why is None else why in found


def test_it_says_what_is_too_old(monkeypatch):
    call = measured("nvfp4", GPU, "w4a4", capability=(10, 0), arch="sm_100")
    monkeypatch.setattr(torch, cublas.FP4, torch.int8, raising=False)
    for found, said in ((None, "made with None"), ("12.6", "from CUDA 12.8 on"), ("9.2", "from CUDA 12.8 on")):
        monkeypatch.setattr(torch.version, "cuda", found)
        assert said in cublas.claims(call)
    monkeypatch.delattr(torch, cublas.FP4)
    assert "2.8 and newer have" in cublas.claims(call)
    assert "bf16 or fp16" in cublas.claims(measured("nvfp4", GPU, "w4a4", capability=(10, 0), dtype=torch.float32))


def test_where_triton_is_its_fp8_is_this_product(monkeypatch):
    call = measured("int4", GPU, "fp8", capability=(9, 0), arch="sm_90")
    monkeypatch.setattr(cublas.versions, "missing", lambda: None)
    assert "in Triton's fp8 already" in cublas.claims(call)


def test_it_is_below_every_other_backend_that_can():
    assert reference.claims(KernelCall("int4", CPU, BF16, "fp8")) > cublas.CLAIM


# -- fp8 on this CPU


@on_this_cpu
@pytest.mark.parametrize("format", FP8)
def test_a_cpu_runs_fp8_only_where_it_is_asked_for(format):
    assert cublas.claims(measured(format, CPU, "fp8", asked=True, arch="cpu")) == cublas.CLAIM
    assert "asked for by name" in cublas.claims(measured(format, CPU, "fp8", arch="cpu"))
    assert self_test(discover()[0]["cublas"], measured(format, CPU, "fp8", asked=True)) is None


@on_this_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 130])
@pytest.mark.parametrize("format", FP8)
def test_fp8_is_the_references(format, rows, dtype):
    unsigned = (64, 256) if FORMATS[format].unsigned_act else (0, 0)
    layer = random_layer(format, n=192, act_unsigned=unsigned, dtype=dtype, centred=True)
    x, bias = torch.randn(rows, 256).to(dtype), torch.randn(192).to(dtype)
    lora = Lora(torch.randn(256, 40).to(dtype), torch.randn(192, 40).to(dtype))
    for beside in ((None, None), (bias, None), (bias, lora)):
        found = cublas.BACKEND.linear(x, layer, *beside, "fp8")
        wanted = reference.linear(x, layer, *beside, "fp8")
        assert found.dtype == dtype and error(found, wanted) < (1e-5 if dtype == torch.float32 else 4e-3)


@on_this_cpu
def test_strengths_and_an_activation_function_are_the_layers(monkeypatch):
    """What is not in its own arguments."""
    layer, x = random_layer("int4"), torch.randn(5, 256)
    lora = Lora(torch.randn(256, 20), torch.randn(96, 20), torch.tensor([0.5, 2.0]))
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "discover", lambda: ({"cublas": discover()[0]["cublas"]}, {}))
    monkeypatch.setattr(dispatch, "KernelCall", lambda *call: KernelCall(*call, measured=True))
    found = dispatch.run(x, layer, None, lora, "fp8", "silu")
    assert error(found, reference.linear(x, layer, None, lora, "fp8", "silu")) < 1e-5


@on_this_cpu
def test_no_rows_and_odd_sizes():
    assert cublas.BACKEND.linear(torch.empty(0, 256), random_layer("int4"), None, None, "fp8").shape == (0, 96)
    with pytest.raises(ValueError, match=r"N to be a multiple of 16 and K of 32, this is int4 at N=95"):
        cublas.BACKEND.linear(torch.randn(3, 256), random_layer("int4", n=95), None, None, "fp8")
    strided = torch.randn(3, 512)[:, ::2]
    layer = random_layer("int4")
    assert torch.equal(
        cublas.BACKEND.linear(strided, layer, None, None, "fp8"),
        cublas.BACKEND.linear(strided.contiguous(), layer, None, None, "fp8"),
    )


@on_this_cpu
def test_rows_with_nan_stay_theirs():
    layer, x = random_layer("int4"), torch.randn(4, 256)
    alone = cublas.BACKEND.linear(x, layer, None, None, "fp8")
    x[1, 3], x[2] = torch.nan, 0
    found = cublas.BACKEND.linear(x, layer, None, None, "fp8")
    assert torch.equal(found[[0, 3]], alone[[0, 3]]) and found[1].isnan().all() and not found[2].any()


# -- NVFP4: what cuBLASLt is handed


def scale_at(flat: torch.Tensor, row: int, group: int, groups: int) -> float:
    """NVIDIA's formula for the place of a scale: tiles of 128 x 4, along a row of tiles first."""
    tile = row // 128 * -(-groups // 4) + group // 4
    return flat[512 * tile + row % 32 * 16 + row % 128 // 32 * 4 + group % 4].item()


def decoded(codes: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """(rows, K) float32 of codes (rows, K/2) and scales in tiles"""
    values = FORMATS["nvfp4"].code_values(unpack(codes.view(torch.int8))).unflatten(-1, (-1, 16))
    rows, groups = values.shape[:2]
    assert flat.dtype == torch.float8_e4m3fn and flat.is_contiguous()
    assert flat.numel() == -(-rows // 128) * 128 * -(-groups // 4) * 4, "what torch checks"
    flat = flat.float()
    scales = torch.tensor([[scale_at(flat, row, group, groups) for group in range(groups)] for row in range(rows)])
    return (values * scales[..., None]).flatten(-2)


@pytest.fixture
def emulated(monkeypatch) -> Iterator[list]:
    """torch._scaled_mm of a Blackwell GPU, by its documentation, as far as NVFP4 needs it."""
    calls = []

    def scaled_mm(a, b, *, scale_a, scale_b, out_dtype):
        assert a.dtype == b.dtype == getattr(torch, cublas.FP4)
        assert a.is_contiguous() and b.t().is_contiguous() and out_dtype == BF16
        assert not any(size % 16 for size in (a.shape[1], *b.shape)), "torch refuses it"
        calls.append(a.shape)
        return (decoded(a, scale_a) @ decoded(b.t(), scale_b).T).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    yield calls
    assert calls


SHAPES = [(3, 96, 256), (128, 64, 64), (130, 272, 192), (257, 16, 32), (1, 144, 96)]


@with_fp4
@pytest.mark.parametrize("dtype", cublas.SIXTEEN)
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
@pytest.mark.parametrize("format", NVFP4)
def test_nvfp4_is_the_references(format, rows, n, k, dtype, emulated):
    layer = random_layer(format, n, k, dtype=dtype, centred=True)
    x, bias = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
    lora = Lora(torch.randn(k, 20).to(dtype), torch.randn(n, 20).to(dtype))
    for beside in ((None, None), (bias, lora)):
        found = cublas.BACKEND.linear(x, layer, *beside, "w4a4")
        assert found.dtype == dtype and error(found, reference.linear(x, layer, *beside, "w4a4")) < ROUNDINGS
    assert TOLERANCE > 0.006


@with_fp4
@pytest.mark.parametrize("format", NVFP4)
def test_it_reads_scales_of_each_channel_and_those_that_lie_by_column(format, emulated):
    layer = random_layer(format, 80, 224, dtype=BF16)  # 14 groups: two more are in memory
    tensors = {**layer.tensors, "wcscales": (torch.rand(80) + 0.5).to(BF16)}
    layer = Layer(layer.spec, tensors)
    blob, views = to_blob(layer.tensors, layer.spec.fmt.by_column)
    by_column = layer.known(layer.spec, from_blob(blob, views))
    assert by_column["wscales"].stride() == (1, 16)
    x = torch.randn(40, 224).to(BF16)
    found = [cublas.BACKEND.linear(x, each, None, None, "w4a4") for each in (layer, by_column)]
    assert torch.equal(*found) and error(found[0], reference.linear(x, layer, None, None, "w4a4")) < ROUNDINGS


@with_fp4
@pytest.mark.parametrize("format", NVFP4)
def test_the_rule_for_scales_of_the_layer_is_kept(format, emulated):
    layer = random_layer(format, dtype=BF16)
    best = FORMATS[format].act_rules[-1]
    spec = type(layer.spec)(format, layer.spec.n, layer.spec.k, layer.spec.rank, act_rule=best)
    x = torch.randn(40, 256).to(BF16)
    found, other = (
        cublas.BACKEND.linear(x, Layer(each, layer.tensors), None, None, "w4a4") for each in (spec, layer.spec)
    )
    assert error(found, reference.linear(x, Layer(spec, layer.tensors), None, None, "w4a4")) < ROUNDINGS
    assert error(found, other) > 0.01


@with_fp4
@pytest.mark.parametrize(("n", "k"), [(96, 240), (95, 256)])
def test_sizes_that_torch_refuses_are_said(n, k):
    with pytest.raises(ValueError, match="needs N to be a multiple of 16 and K of 32"):
        cublas.BACKEND.linear(torch.randn(3, k).to(BF16), random_layer("nvfp4", n, k, dtype=BF16), None, None, "w4a4")
