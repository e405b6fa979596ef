"""What a model's first call would wait for is done before, once, and is no more than it has to be."""

import json
import logging
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from svdquant_pack.kernels import LayerSpec, dispatch, first_use
from svdquant_pack.kernels.backends.triton import versions
from svdquant_pack.kernels.first_use import ROWS, FirstUse
from svdquant_pack.kernels.self_test import sample_of

ROOT = Path(__file__).resolve().parents[2]
GPU, BF16 = torch.device("cuda", 0), torch.bfloat16
KINDS = {"qweight": torch.int8, "wscales": BF16}
SPECS = [LayerSpec("int4", 3072, 12288, 32, unsigned) for unsigned in ((0, 0), (0, 12288), (3072, 12288))]
MOST, WIDE = 8, 2  # WIDE: kernels for LoRAs that are wide beside the branch


ROUTES = {"gluon w4a4", "gluon w4a8-jit", "triton fp8", "triton w4a16", "triton w4a4", "triton w4a8", "triton w8a8"}


def said_by_triton(*arguments: str) -> list[str]:
    """The lines of variants.py, in a process of its own"""
    if versions.missing() is not None or sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs Triton, and builds a libcuda that does nothing")
    code = f"""
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("tests_conftest", "tests/conftest.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))
sys.argv[1:] = {list(arguments)}
runpy.run_path("tests/kernels/variants.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_model_needs_few_kernels_all_known_when_it_loads_and_none_more_for_a_lora():
    """Real layer sizes, every family and GPU, few and many rows, LoRAs; Triton itself says what differs"""
    found = [json.loads(line) for line in said_by_triton()]
    assert len(found) == 70
    for each in found:
        assert 1 <= len(each["kernels"]) <= MOST, each
        assert not each["left for a first LoRA"] and not each["left for the first call"], each
        assert len(each["while loading"]) <= len(each["kernels"]) + WIDE, each


@pytest.fixture(autouse=True)
def nothing_begun(monkeypatch):
    monkeypatch.setattr(first_use, "_begun", set())


@pytest.fixture
def tried(monkeypatch):
    """(spec, rows) of what would run on a GPU, in order"""
    found = []
    monkeypatch.setattr(dispatch, "try_out", lambda sample, *rest: found.append((sample.spec, rest[-1])))
    monkeypatch.setattr(first_use, "compiled", lambda: len(found))
    return found


def settle(*started: FirstUse) -> None:
    end = time.monotonic() + 30
    while any(each.running for each in started):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_kind_of_layer_is_tried_once_however_many_there_are(tried, caplog):
    with caplog.at_level(logging.INFO, "svdquant"):
        first = FirstUse(GPU, "auto")
        for spec in SPECS * 19:
            first.add(spec, KINDS, True, BF16)
        first.close()
        settle(first)
        second = FirstUse(GPU, "auto")  # the same model again
        for spec in SPECS:
            second.add(spec, KINDS, True, BF16)
        second.close()
        settle(second)
    samples = [sample_of(spec, KINDS, True).spec for spec in SPECS]
    assert sorted(tried, key=str) == sorted(((spec, rows) for spec in samples for rows in ROWS), key=str)
    assert (first.kernels, second.kernels, second.seconds) == (len(tried), 0, 0.0)
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == [
        f"{len(tried)} kernels were compiled for cuda:0"
    ]


def test_what_decides_between_kernels_tells_samples_apart():
    specs = [LayerSpec("int4", 3072, 3072, 32), LayerSpec("int4", 3072, 640, 32), LayerSpec("int4", 3072, 3072, 48)]
    kinds = [KINDS, KINDS | {"act_mean": BF16}, KINDS | {"wscales": torch.float16}]
    found = {sample_of(spec, kind, biased) for spec in specs for kind in kinds for biased in (True, False)}
    assert len(found) == 18


def test_a_fault_is_no_fault_of_the_load_and_is_tried_again(monkeypatch, tried):
    def broken(*arguments):
        raise RuntimeError("no compiler")

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "try_out", broken)
        first = FirstUse(GPU, "auto")
        first.add(SPECS[0], KINDS, True, BF16)
        first.close()
        settle(first)
    second = FirstUse(GPU, "auto")
    second.add(SPECS[0], KINDS, True, BF16)
    settle(second)
    assert len(tried) == len(ROWS)


def test_a_model_that_is_gone_stops_it_and_leaves_the_rest_to_the_next(monkeypatch, tried):
    begun, go_on = threading.Event(), threading.Event()

    def wait(sample, *rest):
        begun.set()
        assert go_on.wait(30)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "try_out", wait)
        first = FirstUse(GPU, "auto")
        for spec in SPECS:
            first.add(spec, KINDS, True, BF16)
        assert begun.wait(30)
        first.stop()
        go_on.set()
        settle(first)
    second = FirstUse(GPU, "auto")
    for spec in SPECS:
        second.add(spec, KINDS, True, BF16)
    settle(second)
    assert len(tried) == len(SPECS) * len(ROWS)


def test_nothing_happens_on_a_cpu(tried):
    first = FirstUse(torch.device("cpu"), "auto")
    first.add(SPECS[0], KINDS, True, BF16)
    first.close()
    assert not first.running and not tried


def test_a_copy_of_a_model_takes_no_thread_along(tried):
    first = FirstUse(GPU, "w4a8")
    first.add(SPECS[0], KINDS, True, BF16)
    copied = pickle.loads(pickle.dumps(first))
    settle(first)
    assert (copied.device, copied.compute, copied.kernels) == (GPU, "w4a8", 0)


def test_calls_after_the_first_do_nothing_that_a_cuda_graph_cannot_hold():
    """No number is read back and nothing comes from the host's memory, on every route; tensors have no memory at all"""
    found = [json.loads(line) for line in said_by_triton("host")]
    assert {route for each in found for route in each["routes"]} >= ROUTES
    assert not [each for each in found if any(each["routes"].values())]
