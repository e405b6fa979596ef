"""The asynchronous int8 kernel of sm_90 without a GPU: its own code, copies and products as early or late as may be."""

import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="needs a triton with Gluon")

from svdquant_pack.kernels import Lora
from svdquant_pack.kernels.backends import KernelCall
from svdquant_pack.kernels.backends import gluon as backend
from svdquant_pack.kernels.backends.gluon import int8_async, int8_linear, verify
from svdquant_pack.kernels.backends.gluon.low_rank import LowRank
from svdquant_pack.kernels.backends.reference import linear as reference_linear
from svdquant_pack.kernels.stages import CodedActivation
from svdquant_pack.tests.kernels import gluon_emulator, gluon_hopper_emulator
from svdquant_pack.tests.kernels.layers import RowSteps, random_layer


def emulated(monkeypatch, copies_late: bool, reads_late: bool, multiprocessors: int) -> None:
    def replaced(program, programs):
        return gluon_hopper_emulator.replaced(program, programs, copies_late, reads_late)

    launcher = gluon_emulator.Launcher(int8_async.int8_async_kernel, replaced)
    monkeypatch.setattr(int8_async, "int8_async_kernel", launcher)
    monkeypatch.setattr(int8_async, "TensorDescriptor", gluon_hopper_emulator.Descriptor)
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(verify, "_right", set())


def whole(*call) -> torch.Tensor:
    return int8_linear.prepare(*call, "", RowSteps)(*call)


def operands(m, n, k, rank, biased, dtype=torch.float16):
    generator = torch.Generator().manual_seed(6)
    a8, w8 = (torch.randint(-128, 128, (rows, k), generator=generator, dtype=torch.int8) for rows in (m, n))
    a_scale, w_scale = (torch.rand(rows, generator=generator) * 0.01 for rows in (m, n))
    factors = [torch.randn(rows, rank, generator=generator).to(dtype) for rows in (m, n) if rank]
    bias = torch.randn(n, generator=generator).to(dtype) if biased else None
    return CodedActivation(a8, a_scale), w8, w_scale, LowRank(*factors) if rank else None, bias


@pytest.mark.parametrize("copies_late", [False, True], ids=["copies early", "copies late"])
@pytest.mark.parametrize("reads_late", [False, True], ids=["reads early", "reads late"])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "biased", "multiprocessors"),
    [
        (300, 512, 784, 40, True, 4),  # ragged rows and depth, two slices of the branch, two tiles a program
        (1, 256, 128, 0, False, 4),  # one step: the ring is never full
        (260, 200, 256, 16, True, 1),  # ragged columns; every program has several tiles
        (128, 128, 1040, 0, True, 8),  # one tile, many steps
    ],
)
def test_the_emulated_pipeline_is_the_product(
    monkeypatch, m, n, k, rank, biased, multiprocessors, copies_late, reads_late
):
    emulated(monkeypatch, copies_late, reads_late, multiprocessors)
    act, w8, w_scale, low_rank, bias = operands(m, n, k, rank, biased)
    out = torch.full((m, n), float("nan"), dtype=torch.float16)
    assert int8_async.int8_gemm(act, w8, w_scale, low_rank, bias, out) is out
    expected = (act.qact.double() @ w8.double().T) * act.ascales[:, None] * w_scale
    if low_rank is not None:
        expected += low_rank.act.double() @ low_rank.up.double().T
    if biased:
        expected += bias
    # one rounding to half precision, and float32 steps before it
    assert torch.allclose(out.double(), expected, rtol=2**-10, atol=1e-3)


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("block_barrier()\n            if step", "if step", "still read by this warpgroup alone"),
        ("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,", "still being read"),
        ("step // STAGES & 1)", "0)", None),  # stale operands: the result is wrong
        ("mbarrier.wait(full.index(STAGES), slices & 1)", "pass", None),
    ],
)
def test_the_emulator_sees_a_broken_pipeline(monkeypatch, tmp_path, before, after, complaint):
    """Each line that keeps the pipeline safe, taken out."""
    import inspect

    original = int8_async.int8_async_kernel.fn
    source = inspect.getsource(original)
    assert before in source
    body = source[source.index("def int8_async_kernel") :].replace(before, after)
    variables = dict(original.__globals__)
    exec(compile(body, "broken", "exec"), variables)
    broken = SimpleNamespace(fn=variables["int8_async_kernel"], arg_names=())
    monkeypatch.setattr(int8_async, "int8_async_kernel", broken)
    emulated(monkeypatch, True, True, 2)
    act, w8, w_scale, low_rank, bias = operands(300, 512, 784, 40, True)
    out = torch.full((300, 512), float("nan"), dtype=torch.float16)
    expected = (act.qact.double() @ w8.double().T) * act.ascales[:, None] * w_scale + bias
    expected += low_rank.act.double() @ low_rank.up.double().T
    try:
        int8_async.int8_gemm(act, w8, w_scale, low_rank, bias, out)
    except AssertionError as error:
        assert complaint is None or complaint in str(error)
    else:
        assert complaint is None and not torch.allclose(out.double(), expected, rtol=2**-10, atol=1e-3)


@pytest.mark.parametrize(
    ("format", "m", "n", "rank", "lora", "act_unsigned"),
    [
        ("int4", 40, 256, 16, 5, (64, 192)),  # a LoRA of odd rank beside the branch
        ("int4", 1, 130, 0, 0, (0, 0)),  # no branch, ragged columns
        ("nvfp4", 40, 256, 32, 0, (0, 0)),
    ],
)
def test_the_emulated_layer_agrees_with_the_reference(monkeypatch, format, m, n, rank, lora, act_unsigned):
    emulated(monkeypatch, True, True, 2)
    layer = random_layer(format, n, 192, rank, act_unsigned, torch.bfloat16)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(m, 192, generator=generator).half()
    factors = torch.randn(192, lora, generator=generator) / 14, torch.randn(n, lora, generator=generator)
    bias = torch.randn(n, generator=generator)
    extra = Lora(*factors, torch.linspace(0.5, 1.5, -(-lora // 16))) if lora else None
    y = whole(x, layer, bias, extra)
    expected = reference_linear(x, layer, bias, extra, "w4a8-jit")
    # the branch is rounded to half precision between its factors, which the reference does not do
    assert torch.allclose(y.float(), expected.float(), rtol=2**-9, atol=2**-7)
    assert whole(x[:0], layer, bias, extra).shape == (0, n)


def test_a_strength_that_was_changed_counts_from_the_next_call(monkeypatch):
    """As a server changes it: in inference mode, where torch does not count what is written to a tensor."""
    emulated(monkeypatch, True, True, 2)
    layer, x = random_layer("int4", 128, 192, 16, dtype=torch.float16), torch.randn(4, 192).half()
    with torch.inference_mode():
        lora = Lora(torch.randn(192, 16).half() / 14, torch.randn(128, 16).half(), torch.ones(1))
        run = int8_linear.prepare(x, layer, None, lora, "", RowSteps)
        for strength in (1.0, 0.25, 0.0):
            lora.strength.fill_(strength)
            wanted = reference_linear(x, layer, None, lora, "w4a8-jit")
            assert torch.allclose(run(x, layer, None, lora).float(), wanted.float(), rtol=2**-9, atol=2**-6)


def test_a_wrong_variant_never_computes_for_a_user(monkeypatch):
    """Its own check finds the missing scale before the first result is handed out."""
    emulated(monkeypatch, False, False, 2)
    right = int8_async.int8_gemm
    monkeypatch.setattr(
        "svdquant_pack.kernels.backends.gluon.int8_linear.int8_gemm",
        lambda act, *rest: right(act._replace(ascales=torch.ones_like(act.ascales)), *rest),
    )
    layer = random_layer("int4", 128, 128, 16, dtype=torch.bfloat16)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="is wrong by"):
            whole(torch.ones(3, 128, dtype=torch.float16), layer, None, None)


def test_a_descriptor_is_the_one_that_triton_makes_of_this_tensor():
    """Also where another tensor was at the address before, of the same shape, of another one, or of the same memory."""
    (block, layout) = int8_async.blocks(int8_async.WIDE, torch.float16)["w_desc"]
    copied, memory = int8_async.Copied(block, layout), torch.zeros(1 << 16, dtype=torch.int8)
    tensors = [memory[start : start + n * k].view(n, k) for start, n, k in ((0, 64, 512), (0, 64, 512), (0, 128, 256))]
    tensors += [memory[4096:][: 64 * 512].view(64, 512), torch.zeros(64, 512, dtype=torch.int8)]
    for tensor in [*tensors, *tensors]:
        found, wanted = (
            vars(each) for each in (copied.of(tensor), int8_async.TensorDescriptor.from_tensor(tensor, block, layout))
        )
        assert found.pop("base") is wanted.pop("base") is tensor and found == wanted
    alive = [weakref.ref(tensor) for tensor in tensors]
    del tensors, tensor, found, wanted
    assert not any(each() is not None for each in alive), "nothing of a streamed layer is kept"


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (KernelCall("awq_w4a16", CUDA, torch.float16, "w4a8-jit", (9, 0)), "which awq_w4a16 has not"),
        (KernelCall("int4", CUDA, torch.float16, "w4a8-jit", (8, 9)), "this GPU has 8.9"),
        (KernelCall("int4", CUDA, torch.float16, "w4a8-jit", (10, 0)), "this GPU has 10.0"),
        (KernelCall("int4", CUDA, torch.float32, "w4a8-jit", (9, 0)), "not torch.float32"),
        (KernelCall("int4", CUDA, torch.float16, "fp8", (9, 0)), "not fp8"),
    ],
    ids=str,
)
def test_a_call_it_cannot_run_is_refused_with_a_reason(call, reason):
    assert reason in backend.claims(call)


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_hopper_is_accepted(format):
    assert backend.claims(KernelCall(format, CUDA, torch.bfloat16, "w4a8-jit", (9, 0))) == backend.CLAIM


def test_hopper_without_the_steps_before_the_product_is_refused(monkeypatch):
    monkeypatch.setattr(backend.triton, "claims", lambda call: "Triton's kernels are off")
    call = KernelCall("int4", CUDA, torch.bfloat16, "w4a8-jit", (9, 0))
    assert backend.claims(call) == "Triton's kernels are off"
