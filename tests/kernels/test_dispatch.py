"""Which backend and mode is chosen where, and what happens when one fails."""

import logging

import pytest
import torch

from svdquant_pack.kernels import (
    COMPUTES,
    FORMATS,
    LayerSpec,
    backends,
    choose,
    dispatch,
    modes,
    self_test,
    svdquant_linear,
)
from svdquant_pack.kernels.backends import Backend, KernelCall, cpu, discover, each_call, reference
from svdquant_pack.kernels.dispatch import candidates, faster_format
from svdquant_pack.tests.kernels.layers import random_layer

CPU = torch.device("cpu")
ARCHES = (
    "sm_75",
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_103",
    "sm_110",
    "sm_120",
    "sm_121",
    "sm_130",
    "gfx942",
    "gfx1201",
)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No memory of earlier tests, none left behind."""
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_tested", {})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("arch", [*ARCHES, "cpu", "mps", "sm_999"])
@pytest.mark.parametrize("rows", [1, 128, 768, 4096])
def test_every_gpu_has_a_way_that_always_works(format, arch, rows):
    tried = candidates(format, arch, "auto", rows)
    device = torch.device("cpu" if arch == "cpu" else "cuda")
    calls = {mode: KernelCall(format, device, BF16, mode, None, arch, rows, asked=False) for mode in tried}
    able = [mode for mode, call in calls.items() if reference.claims(call) == 0]
    assert tried[-1] == able[-1] == "w16"
    assert arch == "cpu" or set(able) <= {"w16", "w4a16"}, "it emulates 4 and 8 bit: on a GPU never by itself"


@pytest.mark.parametrize(
    ("format", "arch", "rows", "compute"),
    [
        ("int4", "sm_75", 4096, "w4a4"),
        ("int4", "sm_80", 128, "w4a8"),
        ("int4", "sm_80", 4096, "w4a8-jit"),
        ("int4", "sm_89", 4096, "w4a4"),
        ("int4", "sm_90", 64, "w4a8"),
        ("int4", "sm_90", 4096, "w4a8-jit"),
        ("int4", "sm_100", 4096, "fp8"),
        ("int4", "sm_103", 4096, "fp8"),
        ("int4", "sm_110", 4096, "w4a8"),
        ("int4", "sm_120", 4096, "w4a8"),
        ("int4", "sm_130", 4096, "w4a8"),
        ("int4", "gfx942", 4096, "w4a8"),
        ("nvfp4", "sm_120", 1, "w4a4"),
        ("nvfp4", "sm_103", 4096, "w4a4"),
        ("nvfp4", "sm_89", 4096, "w4a8-jit"),
        ("nvfp4", "sm_110", 4096, "w4a8-jit"),
        ("nvfp4", "sm_130", 4096, "w4a8-jit"),
        ("nvfp4", "sm_75", 4096, "w16"),
        ("awq_w4a16", "sm_90", 2, "w4a16"),
        ("awq_w4a16", "sm_90", 4096, "w16"),
    ],
)
def test_the_table(format, arch, rows, compute):
    assert candidates(format, arch, "auto", rows)[0] == compute


@pytest.mark.parametrize(
    ("arch", "int4", "nvfp4"),
    [
        ("sm_75", None, "int4"),
        ("sm_80", None, None),  # neither in 4 bit
        ("sm_89", None, "int4"),
        ("sm_90", None, None),
        ("sm_100", "nvfp4", None),
        ("sm_120", "nvfp4", None),
        ("gfx942", None, None),
        ("cpu", None, None),
    ],
)
def test_the_table_says_which_file_would_be_faster(arch, int4, nvfp4):
    assert (faster_format("int4", arch), faster_format("nvfp4", arch)) == (int4, nvfp4)
    assert faster_format("awq_w4a16", arch) is None, "modulation layers are in files of either format"


@pytest.mark.parametrize("format", FORMATS)
def test_the_table_names_what_exists(format):
    fmt = FORMATS[format]
    assert {mode.compute for mode in fmt.modes} <= set(fmt.computes) <= {*COMPUTES, "w4a16"}


@pytest.mark.parametrize(
    "capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (13, 0)]
)
@pytest.mark.parametrize("format", FORMATS)
def test_on_every_gpu_some_kernel_claims_the_call(format, capability, monkeypatch):
    """What runs there when all is installed; plain torch stays the last resort."""
    for missing in ("kitchen.missing", "gluon.missing", "triton.versions.missing"):
        monkeypatch.setattr(f"svdquant_pack.kernels.backends.{missing}", lambda: None)
    monkeypatch.setattr("svdquant_pack.kernels.backends.triton.versions.too_old", lambda needed: None)
    arch = f"sm_{capability[0]}{capability[1]}"
    winners = {}
    for rows in (1, 4096):
        for mode in candidates(format, arch, "auto", rows):
            call = KernelCall(format, torch.device("cuda", 0), torch.float16, mode, capability, arch, rows, asked=False)
            claims = {backend.name: backend.claims(call) for backend in discover()[0].values()}
            able = {name: claim for name, claim in claims.items() if not isinstance(claim, str)}
            if able:
                winners[rows] = max(able, key=able.__getitem__), mode
                break
    assert winners == WINNERS[format].get(capability, WINNERS[format][None])


TRITON_16 = {1: ("triton", "w16"), 4096: ("triton", "w16")}
WINNERS = {
    "int4": {
        (7, 5): dict.fromkeys((1, 4096), ("gluon", "w4a4")),
        (8, 0): {1: ("triton", "w4a8"), 4096: ("triton", "w4a8-jit")},
        (9, 0): {1: ("triton", "w4a8"), 4096: ("gluon", "w4a8-jit")},
        (10, 0): {1: ("triton", "w4a8"), 4096: ("triton", "fp8")},
        (10, 3): {1: ("triton", "w4a8"), 4096: ("triton", "fp8")},
        **dict.fromkeys(((11, 0), (12, 0), (13, 0)), dict.fromkeys((1, 4096), ("triton", "w4a8"))),
        None: dict.fromkeys((1, 4096), ("kitchen", "w4a4")),
    },
    "nvfp4": {
        (7, 5): TRITON_16,
        (9, 0): dict.fromkeys((1, 4096), ("gluon", "w4a8-jit")),
        (10, 0): dict.fromkeys((1, 4096), ("triton", "w4a4")),
        (10, 3): dict.fromkeys((1, 4096), ("triton", "w4a4")),
        (12, 0): dict.fromkeys((1, 4096), ("triton", "w4a4")),
        None: dict.fromkeys((1, 4096), ("triton", "w4a8-jit")),
    },
    "awq_w4a16": {
        (7, 5): {1: ("reference", "w4a16"), 4096: ("triton", "w16")},
        None: {1: ("triton", "w4a16"), 4096: ("triton", "w16")},
    },
}


def test_rows_are_rounded_to_the_limits_of_the_table():
    limits = {mode.rows for fmt in FORMATS.values() for mode in fmt.modes} - {None}
    assert limits == {modes.FEW, modes.SOME}
    assert {dispatch.bucket(rows) for rows in range(1, 20000, 7)} == {*limits, dispatch.USUAL_ROWS}
    for limit in limits:
        assert dispatch.bucket(limit) == limit and dispatch.bucket(limit + 1) > limit


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("compute", COMPUTES)
def test_a_cpu_runs_int8_or_the_reference_and_says_why(format, compute):
    if (format, compute) == ("nvfp4", "w4a8"):
        with pytest.raises(ValueError, match="not w4a8"):
            choose(LayerSpec(format, 64, 64), CPU, BF16, compute)
        return
    choice, int8 = choose(LayerSpec(format, 64, 64), CPU, BF16, compute), cpu.exact() is None
    wanted = compute if compute not in ("auto", "measured") else "w8a8" if int8 else "w4a4"
    assert choice.compute == wanted
    assert choice.backend.name == ("cpu" if int8 and wanted in cpu.COMPUTES else "reference")
    if compute in ("auto", "w4a4"):
        assert "GPU" in choice.passed_over["triton"]
    assert choice.backend.name not in choice.passed_over


def backend_of(name: str, linear, claim: int = 99) -> Backend:
    return Backend(name, lambda call: claim, each_call(linear))


def with_backends(monkeypatch, *backends: Backend) -> None:
    found = {backend.name: backend for backend in (*backends, reference.BACKEND)}
    monkeypatch.setattr(dispatch, "discover", lambda: (found, {}))


def test_a_backend_that_fails_is_turned_off_and_the_next_takes_over(monkeypatch, caplog):
    calls = []

    def broken(*arguments):
        calls.append(1)
        raise RuntimeError("no kernel image")

    with_backends(monkeypatch, backend_of("broken", broken))
    layer, x = random_layer("int4"), torch.randn(3, 256)
    with caplog.at_level(logging.WARNING, "svdquant"):
        first, second = (svdquant_linear(x, layer, compute="w16") for _ in range(2))
    assert len(calls) == 1 and torch.equal(first, second) and len(caplog.records) == 1
    reason = choose(LayerSpec("int4", 96, 256, 16), CPU, torch.float32, "w16").passed_over["broken"]
    assert "no kernel image" in reason and "no kernel image" in caplog.text


def test_out_of_memory_is_the_hosts_business(monkeypatch):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("full")

    with_backends(monkeypatch, backend_of("full", full))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        svdquant_linear(torch.randn(3, 256), random_layer("int4"), compute="w16")
    assert choose(LayerSpec("int4", 96, 256, 16), CPU, torch.float32, "w16").backend.name == "full"


@pytest.mark.parametrize("compute", ["w4a4", "w4a8", "w4a8-jit", "w16"])
def test_the_self_test_passes_what_is_right(compute):
    call = KernelCall("int4", CPU, BF16, compute)
    assert self_test.self_test(reference.BACKEND, call) is None


WRONG = {
    "a wrong sign": lambda y: -y,
    "a lost row": lambda y: y * (torch.arange(y.shape[0]) > y.shape[0] // 2)[:, None],
    "one NaN": lambda y: torch.where(torch.arange(y.numel()).view_as(y) == 7, torch.nan, y),
    "a wrong scale": lambda y: y * 1.03,
    "a wrong shape": lambda y: y[:, :-1],
}


@pytest.mark.parametrize("fault", WRONG)
def test_the_self_test_finds(fault):
    wrong = backend_of("wrong", lambda *arguments: WRONG[fault](reference.linear(*arguments)))
    reason = self_test.self_test(wrong, KernelCall("int4", CPU, BF16, "w4a4"))
    assert reason is not None and "self-test" in reason


def test_a_self_test_that_fails_says_so_once(monkeypatch, caplog):
    """As on a GPU: the call's device only has to say that it is one."""
    wrong = backend_of("wrong", lambda *arguments: -reference.linear(*arguments))
    call = KernelCall("int4", CPU, BF16, "w16")
    monkeypatch.setattr(dispatch, "self_test", self_test.self_test)
    with caplog.at_level(logging.WARNING, "svdquant"):
        object.__setattr__(call, "device", type("Gpu", (), {"type": "cuda", "__str__": lambda self: "cuda:0"})())
        monkeypatch.setattr(dispatch, "self_test", lambda backend, call, tested: "its self-test is wrong by 2")
        reasons = [dispatch.fault_of(wrong, call) for _ in range(3)]
    assert reasons[0] == reasons[2] and "wrong by 2" in reasons[0] and len(caplog.records) == 1


def test_a_backend_without_epilogue_gets_one(monkeypatch):
    plain = backend_of("plain", lambda *arguments: reference.linear(*arguments))
    with_backends(monkeypatch, plain)
    layer, x = random_layer("int4"), torch.randn(3, 256)
    lora = torch.randn(256, 20), torch.randn(96, 20), torch.tensor([0.5, 2.0])
    y = svdquant_linear(x, layer, None, lora, "w16", "silu")
    wanted = reference.linear(x, layer, None, lora, "w16", "silu")
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-4)


def test_the_highest_claim_runs_and_a_refusal_is_a_reason(monkeypatch):
    low, high = (backend_of(name, reference.linear, claim) for name, claim in (("low", 1), ("high", 2)))
    with_backends(monkeypatch, low, high, Backend("never", lambda call: "is out of order", each_call(reference.linear)))
    choice = choose(LayerSpec("int4", 96, 256, 16), CPU, BF16)
    assert choice.backend.name == "high" and choice.passed_over["never"] == "is out of order"


def test_a_module_without_backend_is_none(tmp_path, monkeypatch):
    (tmp_path / "beside_them.py").write_text("NOTHING = None\n")
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    found, absent = discover.__wrapped__()  # not the answer that is kept
    assert "beside_them" not in found and "beside_them" not in absent and found.keys() == discover()[0].keys()
