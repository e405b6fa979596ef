"""The INT4 tensor-core kernel without a GPU: fragment order, PTX register tables, and the kernel's own code."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="needs a triton with Gluon")

from svdquant_pack.kernels import FORMATS, Lora
from svdquant_pack.kernels.backends import KernelCall
from svdquant_pack.kernels.backends import gluon as backend
from svdquant_pack.kernels.backends.gluon import int4_linear, int4_mma, verify
from svdquant_pack.kernels.backends.gluon.int4_linear import in_fragments
from svdquant_pack.kernels.backends.reference import linear as reference_linear
from svdquant_pack.kernels.packing import pack, sign_extend, unpack
from svdquant_pack.kernels.stages import CodedActivation
from svdquant_pack.tests.kernels import gluon_emulator as emulator
from svdquant_pack.tests.kernels.layers import quantized, random_layer


def random_weight(n: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(k // 64, n, generator=generator) + 0.5).to(dtype)
    return pack(codes), scales


@pytest.mark.parametrize(("instruction", "rows"), [("m16n8k64", 16), ("m8n8k32", 8)])
@pytest.mark.parametrize("kind", ["s4", "u4"])
def test_packed_fragments_give_the_exact_integer_product_lane_by_lane(instruction, rows, kind):
    """The registers a lane gets, through the PTX tables, against a plain integer product."""
    generator = torch.Generator().manual_seed(2)
    qweight, wscales = random_weight(64, 128)
    codes = torch.randint(0, 16, (16, 128), generator=generator, dtype=torch.uint8)
    fragments = in_fragments(qweight, wscales)[0].view(torch.int32).view(1, 2, 8, 32, 2)
    activation = pack(codes).view(torch.int32)  # (16, K/8)
    group, thread = torch.arange(32) // 4, torch.arange(32) % 4
    values = codes.int() if kind == "u4" else sign_extend(codes).int()
    weight = sign_extend(unpack(qweight)).int()

    for g in range(2):
        low, high = ([activation[group + row, 8 * g + half + thread] for half in (0, 4)] for row in (0, 8))
        expected = values[:, g * 64 : g * 64 + 64] @ weight[:, g * 64 : g * 64 + 64].T  # (16, 64)
        for nt in range(8):
            b = fragments[0, g, nt].unbind(-1)
            zero = torch.zeros(32, dtype=torch.int32)
            name = f"mma.sync.aligned.{instruction}.row.col.s32.{kind}.s4.s32"
            if rows == 16:
                c = emulator.mma(name, [low[0], high[0], low[1], high[1]], list(b), [zero] * 4)
            else:
                c = []
                for half in (low, high):
                    first = emulator.mma(name, [half[0]], [b[0]], [zero] * 2)
                    c += emulator.mma(name, [half[1]], [b[1]], first)
            for index, register in enumerate(c):
                row, column = group + 8 * (index // 2), nt * 8 + thread * 2 + index % 2
                assert torch.equal(register, expected[row, column])


def emulated(monkeypatch: pytest.MonkeyPatch, late: bool = True) -> None:
    """Launch the kernel's source in the emulator; the quantizer's part is done by the format it follows."""
    launcher = emulator.Launcher(int4_mma.int4_mma_kernel, partial(emulator.language, late=late))
    monkeypatch.setattr(int4_linear, "int4_mma_kernel", launcher)
    quantizer = lambda x, layer, codes, lora: lambda x, layer, lora: quantized(x, layer, codes, lora)  # noqa: E731
    monkeypatch.setattr(int4_linear, "quantizer", quantizer)
    monkeypatch.setattr(verify, "_right", set())


def whole(*call) -> torch.Tensor:
    return int4_linear.prepare(*call, "")(*call)


KINDS = {"signed": (0, 0), "unsigned": (0, 256), "unsigned behind": (128, 256), "unsigned between": (64, 128)}


def product(m: int, n: int, k: int, act_unsigned: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(the kernel's product, the exact one): scales that are powers of two keep every step exact"""
    generator = torch.Generator().manual_seed(3)
    dtype = torch.float16
    codes = torch.randint(0, 16, (m, k), generator=generator, dtype=torch.uint8)
    ascales = torch.full((k // 64, m), 2.0**-6, dtype=dtype)
    qweight, wscales = random_weight(n, k, dtype)
    wscales = torch.full_like(wscales, 0.5) * (1 + torch.arange(n) % 2)
    out = torch.full((m, n), float("nan"), dtype=dtype)
    int4_linear.int4_gemm(
        CodedActivation(pack(codes), ascales), in_fragments(qweight, wscales), None, None, out, act_unsigned
    )
    act = FORMATS["int4"].decode_activation(codes, ascales.T, act_unsigned).double()
    decoded = sign_extend(unpack(qweight)).double() * wscales[0].double()[:, None]
    return out, (act @ decoded.T).half()


@pytest.mark.parametrize("variant", ["early", "late", "sm_75"])
@pytest.mark.parametrize("act_unsigned", KINDS.values(), ids=KINDS)
def test_the_emulated_kernel_is_the_exact_product(monkeypatch, act_unsigned, variant):
    """Wherever copies to shared memory land between when they are started and when they are waited for."""
    emulated(monkeypatch, variant != "early")
    monkeypatch.setattr(int4_linear, "_is_turing", lambda device: variant == "sm_75")
    assert torch.equal(*product(77, 130, 256, act_unsigned))


@pytest.mark.parametrize(("m", "k"), [(17, 64), (129, 128), (40, 704)])
def test_a_ring_longer_than_the_sum_and_one_that_goes_round(monkeypatch, m, k):
    emulated(monkeypatch)
    assert torch.equal(*product(m, 192, k, (0, 64)))


@pytest.mark.parametrize("fault", ["a copy that is not waited for", "a stage that is refilled too early"])
def test_the_emulator_sees_a_ring_that_is_wrong(monkeypatch, fault):
    emulated(monkeypatch, fault == "a copy that is not waited for")
    if fault == "a copy that is not waited for":
        wait = emulator.Copies.wait_group
        monkeypatch.setattr(emulator.Copies, "wait_group", lambda self, outstanding: wait(self, outstanding + 1))
    else:
        index = emulator.Shared.index
        monkeypatch.setattr(emulator.Shared, "index", lambda self, stage: index(self, stage % 3))
    found, exact = product(40, 192, 704, (0, 0))
    assert not torch.equal(found, exact)


LINE = 128  # bytes of cache


@pytest.mark.parametrize("turing", [False, True], ids=["sm_80", "sm_75"])
@pytest.mark.parametrize("rows", [16, 200])
def test_a_group_of_the_weight_is_few_lines_of_cache(monkeypatch, rows, turing):
    """By the kernel's own address formulas: 16 for 64 columns, used whole; in natural order 64, a quarter of each."""
    emulated(monkeypatch)
    monkeypatch.setattr(int4_linear, "_is_turing", lambda device: turing)
    n, k = 256, 1024
    qweight, wscales = (part for part in random_weight(n, k, torch.float16))
    weight = in_fragments(qweight, wscales)
    load, seen = emulator.Language.load, []

    def record(pointer):
        if pointer.buffer.data_ptr() == weight[0].data_ptr():
            seen.append(pointer.offset * pointer.buffer.itemsize // LINE)
        return load(pointer)

    monkeypatch.setattr(emulator.Language, "load", staticmethod(record))
    act = CodedActivation(torch.zeros(rows, k // 2, dtype=torch.int8), torch.ones(k // 64, rows, dtype=torch.float16))
    int4_linear.int4_gemm(act, weight, None, None, torch.empty(rows, n, dtype=torch.float16))
    columns = 256 if rows == 16 else 128
    first = seen[:2] if turing else seen[:1]  # a warp loads the halves of its columns one after the other
    assert torch.cat([lines.flatten() for lines in first]).unique().numel() == 16 * columns // 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "rank", "lora", "biased", "act_unsigned", "parts"),
    [
        (1, 64, 16, 0, True, (0, 0), torch.bfloat16),  # one row, the tiling for few rows
        (65, 130, 32, 0, True, (0, 128), torch.float16),  # ragged both ways
        (20, 96, 0, 0, False, (0, 192), torch.bfloat16),  # no branch, all unsigned
        (33, 258, 16, 5, True, (64, 192), torch.float32),  # a LoRA of odd rank, scales in fp32
        (17, 65, 16, 0, True, (0, 0), torch.bfloat16),  # an odd column
        (33, 192, 16, 0, True, (64, 128), torch.bfloat16),  # put in order when it was loaded, one tile and a half
    ],
)
def test_the_emulated_layer_agrees_with_the_reference(
    monkeypatch, m, n, rank, lora, biased, act_unsigned, parts, dtype
):
    emulated(monkeypatch)
    layer = random_layer("int4", n, 192, rank, act_unsigned, parts, centred=True)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(m, 192, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator) if biased else None
    factors = (torch.randn(192, lora, generator=generator) / 14, torch.randn(n, lora, generator=generator))
    extra = Lora(*factors, torch.linspace(0.5, 1.5, -(-lora // 16))) if lora else None
    y = whole(x, layer, bias, extra)
    expected = reference_linear(x, layer, bias, extra, "w4a4")
    arranged = layer.in_order("fragments")
    assert arranged.order == ("" if n % 64 else "fragments")
    assert y.shape == (m, n) and torch.equal(y, whole(x, arranged, bias, extra))
    # the branch and the bias are rounded to the dtype of x once more than in the reference: two roundings of terms
    # below 8 in all
    assert (y - expected).abs().max() <= 8 * torch.finfo(dtype).eps * 2


def test_a_wrong_variant_never_computes_for_a_user(monkeypatch):
    """Its own check finds the swapped operands before the first result is handed out."""
    emulated(monkeypatch)
    right = emulator.mma
    monkeypatch.setattr(emulator, "mma", lambda name, a, b, c: right(name, a, b[::-1], c))
    layer = random_layer("int4", 64, 128, 16, dtype=torch.bfloat16)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="is wrong by"):
            whole(torch.ones(3, 128, dtype=torch.float16), layer, None, None)


def test_nan_in_a_row_stays_in_that_row(monkeypatch):
    emulated(monkeypatch)
    layer = random_layer("int4", 64, 128, 16, dtype=torch.bfloat16)
    x = torch.ones(20, 128, dtype=torch.bfloat16)
    x[3, 70] = torch.nan
    y = whole(x, layer, None, None)
    assert y[3].isnan().all() and not y[[*range(3), *range(4, 20)]].isnan().any()


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (KernelCall("nvfp4", CUDA, torch.float16, "w4a4", (8, 9)), "this layer is nvfp4"),
        (KernelCall("int4", CUDA, torch.float16, "w16", (8, 9)), "not w16"),
        (KernelCall("int4", torch.device("cpu"), torch.float16, "w4a4"), "needs an NVIDIA GPU"),
        (KernelCall("int4", CUDA, torch.float16, "w4a4", (9, 0)), "this GPU has 9.0"),
        (KernelCall("int4", CUDA, torch.float16, "w4a4", (12, 0)), "this GPU has 12.0"),
        (KernelCall("int4", CUDA, torch.float16, "w4a4", (7, 0)), "this GPU has 7.0"),
        (KernelCall("int4", CUDA, torch.bfloat16, "w4a4", (7, 5)), "not torch.bfloat16"),
        (KernelCall("int4", CUDA, torch.float32, "w4a4", (8, 6)), "not torch.float32"),
    ],
    ids=str,
)
def test_a_call_it_cannot_run_is_refused_with_a_reason(call, reason):
    assert reason in backend.claims(call)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9)], ids=str)
def test_int4_tensor_cores_are_accepted(capability):
    assert backend.claims(KernelCall("int4", CUDA, torch.float16, "w4a4", capability)) == backend.CLAIM


def test_without_gluon_the_reason_is_kept(monkeypatch):
    monkeypatch.setattr(backend, "missing", lambda: "triton is not installed")
    assert backend.claims(KernelCall("int4", CUDA, torch.float16, "w4a4", (8, 9))) == "triton is not installed"
