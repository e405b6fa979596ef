"""Tuning of launch settings: the real kernels on tiny layers, with a clock that says what the test needs."""

import json
import logging
from pathlib import Path

import pytest
import torch

from svdquant_pack.kernels.backends import KernelCall, discover
from svdquant_pack.kernels.dispatch import candidates

tune = pytest.importorskip("svdquant_pack.kernels.backends.triton.tune")
from svdquant_pack.kernels.backends.triton import tiles, tuned  # noqa: E402 (only where Triton is)
from svdquant_pack.kernels.backends.triton.tune import Job, LayerShape, make_job, save, search  # noqa: E402
from svdquant_pack.quantize.cli.tune import report  # noqa: E402
from svdquant_pack.tests.kernels.test_triton_layers import need  # noqa: E402

MODES = [("int4", "w4a8"), ("int4", "w4a8-jit"), ("nvfp4", "w4a4"), ("awq_w4a16", "w4a16")]
KERNELS = {
    ("int4", "w4a4"): {"quantize_groups", "gemm_w4"},
    ("int4", "w4a8"): {"quantize_groups", "gemm_w4"},
    ("int4", "w4a8-jit"): {"quantize_rows", "expand_weight", "gemm_w8"},
    ("nvfp4", "w4a4"): {"quantize_nvfp4", "gemm_nvfp4"},
    ("nvfp4", "w4a8-jit"): {"quantize_rows", "expand_weight", "gemm_w8"},
    ("awq_w4a16", "w4a16"): {"gemv_w4a16"},
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    tiles.tuned_here.cache_clear()
    yield
    tiles.tuned_here.cache_clear()


@pytest.fixture
def interpreter(device) -> torch.device:
    """For tests that know which settings the interpreter takes from tiles.json."""
    if device.type == "cuda":
        pytest.skip("a GPU has other entries; test_gpu_tune.py is for it")
    return device


def job_of(format: str, compute: str, device: torch.device, rows: int = 20) -> Job:
    need(format, compute, device)
    rank = 0 if format == "awq_w4a16" else 32
    return make_job(LayerShape(format, 80, 256, rank), rows, device, torch.bfloat16, "auto" if rank == 0 else compute)


def smallest(kernel: str, device: torch.device, name: str = "BM"):
    """A clock by which the smallest tile of `kernel` is the fastest."""
    return lambda run: float(tiles.settings(kernel, device, 20)[name])


@pytest.mark.parametrize(("format", "compute"), MODES)
def test_every_candidate_gives_the_right_numbers(format, compute, device):
    found = search([job_of(format, compute, device)], lambda run: 1.0)
    assert {each.kernel for each in found} == KERNELS[format, compute]
    for each in found:
        assert device.type == "cuda" or not each.left_out, each.left_out
        assert each.settings == tiles.as_shipped(each.kernel, each.index), "nothing is faster: as shipped"


def test_the_fastest_stays_and_later_processes_launch_with_it(interpreter):
    job = job_of("int4", "w4a8", interpreter)
    before, said = job.run(), []
    found = search([job], smallest("gemm_w4", interpreter, "BN"), lambda *progress: said.append(progress))
    (best,) = [each for each in found if each.kernel == "gemm_w4"]
    assert best.settings["BN"] == 64 and best.seconds < best.shipped_seconds == 128
    assert said[-1][0] == said[-1][1] == sum(len(tiles.choices(each.kernel)) for each in found)
    assert tiles.settings("gemm_w4", interpreter, 20)["BN"] == 128, "not before it is written"
    path = save(found, interpreter, Path.write_bytes)
    assert list(json.loads(path.read_text())) == [tiles.machine(interpreter)]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no temporary file is left"
    assert tiles.settings("gemm_w4", interpreter, 20) == best.settings
    assert tiles.settings("gemm_w4", interpreter, 5000)["BM"] == 64, "other row counts are as shipped"
    torch.testing.assert_close(job.run(), before)


def test_what_is_wrong_or_does_not_run_is_left_out(interpreter):
    job = job_of("int4", "w4a8", interpreter)

    def run() -> torch.Tensor:
        size = tiles.settings("gemm_w4", interpreter, 20)["BM"]
        if size == 32:
            raise RuntimeError("out of resource: shared memory")
        return job.run() * (1.1 if size == 64 else 1.0)

    found = search([Job(run, job.wanted)], lambda run: -float(tiles.settings("gemm_w4", interpreter, 20)["BM"]))
    (best,) = [each for each in found if each.kernel == "gemm_w4"]
    assert best.settings["BM"] == 128, "64 would be faster than 16 as well, were it right"
    reasons = best.left_out
    assert all(("'BM': 32" in text) == ("shared memory" in why) for text, why in reasons.items())
    assert all(("'BM': 64" in text) == ("wrong by" in why) for text, why in reasons.items()) and len(reasons) > 2


def test_nothing_is_found_where_the_shipped_settings_fail(device):
    job = job_of("int4", "w4a8", device)
    with pytest.raises(RuntimeError, match="does not run as shipped on this GPU: wrong by"):
        search([Job(job.run, -job.wanted)], lambda run: 1.0)


def test_a_second_run_keeps_what_the_first_found_of_other_kernels(interpreter):
    for compute, kernel in (("w4a8", "gemm_w4"), ("w4a8-jit", "expand_weight")):
        found = search([job_of("int4", compute, interpreter)], smallest(kernel, interpreter, "BN"))
        path = save(found, interpreter, Path.write_bytes)
    tables = json.loads(path.read_text())[tiles.machine(interpreter)]
    assert {kernel: [each["BN"] for each in found] for kernel, found in tables.items()} == {
        "gemm_w4": [64],
        "expand_weight": [8],
    }


def test_the_whole_of_it_from_shapes_to_a_file_and_a_report(interpreter):
    shapes = [LayerShape("awq_w4a16", 128, 256, 0, 2)]
    found, path = tune.tune(shapes, interpreter, Path.write_bytes, seconds=smallest("gemv_w4a16", interpreter, "BN"))
    data, text = report(found, str(path))
    assert data["entries"][0]["settings"]["BN"] == 16 and data["entries"][0]["seconds"] == 2 * 16, "twice: count"
    assert "gemv_w4a16" in text and " 0.50 of the layers' time" in text and text.endswith(f"written to {path}")
    assert "nothing to tune" in report([], str(path))[1]


ENTRY = {"arch": "", "rows": None, "BN": 8, "BYTES": 128, "num_warps": 4, "num_stages": 3}
BAD = {
    "no JSON": "{",
    "another file": "[1, 2]",
    "no tables": '{"HERE": [1]}',
    "unknown settings": {"expand_weight": [ENTRY | {"BN": 7}]},
    "unknown rows": {"expand_weight": [ENTRY | {"rows": 100}]},
    "unknown kernel": {"another": [ENTRY]},
}


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_is_not_usable_is_told_once_and_ignored(fault, device, caplog):
    here, text = tiles.machine(device), BAD[fault]
    tuned.path().parent.mkdir()
    tuned.path().write_text(text.replace("HERE", here) if isinstance(text, str) else json.dumps({here: text}))
    with caplog.at_level(logging.WARNING, "svdquant"):
        for _ in range(2):
            assert tiles.settings("expand_weight", device, 96) == tiles.as_shipped("expand_weight", 0)
    assert len(caplog.records) == 1 and "quantize tune" in caplog.text
    tuned.path().write_bytes(tuned.with_tables(here, {"expand_weight": [ENTRY]}))  # and it is replaced by the next run
    tiles.tuned_here.cache_clear()
    assert tiles.settings("expand_weight", device, 96)["BN"] == 8


def test_the_file_of_another_machine_changes_nothing(device):
    tuned.path().parent.mkdir()
    tuned.path().write_bytes(tuned.with_tables("another GPU, triton 1.0", {"expand_weight": [ENTRY]}))
    assert tiles.settings("expand_weight", device, 96) == tiles.as_shipped("expand_weight", 0)
    tuned.path().write_bytes(tuned.with_tables(tiles.machine(device), {}))
    assert len(tuned.read()) == 2, "what is known of other machines stays"


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"])
def test_a_model_compiles_ten_variants_at_most(format, arch, monkeypatch):
    """Tuned or not: tuning puts one setting in the place of one. A model has layers of its format, and awq ones."""
    for backend in ("kitchen", "gluon"):  # as if all were installed
        monkeypatch.setattr(f"svdquant_pack.kernels.backends.{backend}.missing", lambda: None)
    number = arch.removeprefix("sm_")
    capability = (int(number[:-1]), int(number[-1])) if number.isdigit() else None
    places = {("expand_weight", 0)}  # for 16-bit weights
    for rows in (1, 16, 64, 128, 256, 512, 768, 1024, 4096, 65536):
        for layer in (format, "awq_w4a16"):
            mode = candidates(layer, arch, "auto", rows)[0]
            call = KernelCall(layer, torch.device("cuda"), torch.bfloat16, mode, capability, arch, rows, asked=False)
            claims = {backend.name: backend.claims(call) for backend in discover()[0].values()}
            able = {name: claim for name, claim in claims.items() if not isinstance(claim, str)}
            if max(able, key=able.__getitem__) == "triton":
                places |= {(name, tiles.entry(name, arch, rows)) for name in KERNELS.get((layer, mode), ())}
    assert len(places) <= 10
