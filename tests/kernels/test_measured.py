"""What was measured is kept, read in another process, used where it was asked for, and by nobody else."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdquant_pack.kernels import COMPUTES, LayerSpec, Prepared, choose, dispatch, measured, rivals, svdquant_linear
from svdquant_pack.kernels.backends import Backend, discover, each_call, reference
from svdquant_pack.kernels.measured import FACTS, ROWS, Kind, Measured, Timed, facts, find, known, path, save
from svdquant_pack.kernels.modes import FEW, USUAL_ROWS
from svdquant_pack.quantize.files.lifecycle import write_whole
from svdquant_pack.tests.kernels.layers import random_layer

ROOT = Path(__file__).resolve().parents[2]
CPU, FP32 = torch.device("cpu"), torch.float32
SPEC = LayerSpec("int4", 96, 256, 16)
OTHERS = [compute for compute in COMPUTES if compute != "measured"]


pytestmark = pytest.mark.usefixtures("as_in_a_new_process")


def new_process() -> None:
    """Forget what this one knows of the file."""
    known.cache_clear()
    dispatch.forget_choices()


def result(spec: LayerSpec = SPEC, rows: int = USUAL_ROWS, backend: str = "reference") -> Measured:
    """As if w16 had been found to be the fastest."""
    compute = "w16"
    usual = choose(spec, CPU, FP32, "auto", rows)
    timed = Timed(usual.backend.name, usual.compute, 2.0, 0.0), Timed(backend, compute, 1.0, 0.001)
    return Measured(Kind.of(spec, FP32, rows), backend, compute, "2026-01-31", timed, {"cpu fp8": "wrong by 2"})


def chosen(spec: LayerSpec = SPEC, rows: int = USUAL_ROWS, compute: str = "measured") -> tuple[str, str]:
    choice = choose(spec, CPU, FP32, compute, rows)
    return choice.backend.name, choice.compute


def test_without_a_file_the_tables_decide():
    for rows in ROWS:
        choice = choose(SPEC, CPU, FP32, "measured", rows)
        assert choice == choose(SPEC, CPU, FP32, "auto", rows) and choice.measured is None
    assert not path().exists(), "nothing is measured or written by choosing"


def test_what_was_measured_runs_for_that_size_and_number_of_rows_alone():
    assert chosen() != ("reference", "w16")
    save([result()], CPU, write_whole)
    dispatch.forget_choices()
    assert chosen() == ("reference", "w16") == chosen(rows=769)
    for other in (LayerSpec("int4", 96, 512, 16), LayerSpec("int4", 192, 256), LayerSpec("nvfp4", 96, 256, 16)):
        assert chosen(other) == chosen(other, compute="auto")
    for other in (replace(SPEC, act_bits=8), replace(SPEC, act_unsigned=(64, 128))):
        assert chosen(other) == chosen(other, compute="auto")
    assert chosen(rows=768) == chosen(rows=768, compute="auto")
    assert choose(SPEC, CPU, torch.bfloat16, "measured") == choose(SPEC, CPU, torch.bfloat16)
    assert chosen(replace(SPEC, rank=64, act_unsigned=(0, 256))) == ("reference", "w16"), "of the same kind"


def test_who_did_not_ask_for_it_gets_the_same_numbers_as_before():
    """Pictures do not change between runs."""
    layer, x = random_layer("int4"), torch.randn(5, 256)
    before = {compute: svdquant_linear(x, layer, compute=compute) for compute in OTHERS}
    prepared = {compute: Prepared(compute) for compute in OTHERS}
    with torch.no_grad():
        for each in prepared.values():
            each(x, layer, None, None)
    save([result(rows=rows) for rows in ROWS], CPU, write_whole)
    new_process()
    for compute in OTHERS:
        assert torch.equal(svdquant_linear(x, layer, compute=compute), before[compute])
        with torch.no_grad():
            assert torch.equal(prepared[compute](x, layer, None, None), before[compute])
    found = svdquant_linear(x, layer, compute="measured")
    assert torch.equal(found, before["w16"]) and not torch.equal(found, before["auto"])


def test_another_process_reads_it():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import conftest, torch
torch.set_num_threads({torch.get_num_threads()})
from svdquant_pack.kernels import LayerSpec, choose
from svdquant_pack.kernels.dispatch import USUAL_ROWS
for compute in ("measured", "auto"):
    choice = choose(LayerSpec("int4", 96, 256, 16), torch.device("cpu"), torch.float32, compute)
    print(choice.backend.name, choice.compute, choice.measured and choice.measured.date)
"""

    def said() -> list[str]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    usual = " ".join((*chosen(compute="auto"), "None"))
    save([result()], CPU, write_whole)
    assert said() == ["reference w16 2026-01-31", usual]
    path().unlink()
    assert said() == [usual, usual]


def test_a_measurement_is_what_is_read_again():
    wanted = [(SPEC, FEW), (LayerSpec("nvfp4", 64, 128, 16), FEW)]
    found = rivals.measure(wanted, CPU, FP32, write_whole)
    new_process()
    assert known(CPU) == ({each.kind: each for each in found}, "")
    for (spec, rows), each in zip(wanted, found, strict=True):
        assert chosen(spec, rows) == (each.backend, each.compute)
    assert [entry.name for entry in path().parent.iterdir()] == [path().name], "no temporary file is left"


def test_the_file_is_read_once_and_the_hot_path_asks_for_nothing(monkeypatch):
    save([result(rows=rows) for rows in ROWS], CPU, write_whole)
    new_process()
    asked, read = [], measured._read
    monkeypatch.setattr(measured, "_read", lambda: (asked.append("file"), read())[1])
    monkeypatch.setattr(dispatch, "find", lambda *kind: (asked.append("kind"), find(*kind))[1])
    layer, x, prepared = random_layer("int4"), torch.randn(5, 256), Prepared("measured")
    with torch.no_grad():
        first = [prepared(x, layer, None, None) for _ in range(5)]
    assert asked == ["kind", "file"]
    assert all(torch.equal(each, svdquant_linear(x, layer, compute="w16")) for each in first)


def test_what_is_measured_later_is_used_by_layers_that_were_prepared_before():
    layer, x, prepared = random_layer("int4"), torch.randn(5, 256), Prepared("measured")
    with torch.no_grad():
        usual = [prepared(x, layer, None, None) for _ in range(2)][1]
        save([result(rows=FEW)], CPU, write_whole)
        dispatch.forget_choices()
        later = [prepared(x, layer, None, None) for _ in range(2)]
    wanted = svdquant_linear(x, layer, compute="w16")
    assert all(torch.equal(each, wanted) for each in later) and not torch.equal(usual, wanted)


def test_it_says_what_the_others_took():
    save([result()], CPU, write_whole)
    choice = choose(SPEC, CPU, FP32, "measured")
    usual = choose(SPEC, CPU, FP32)
    assert choice.measured is not None and choice.measured.date == "2026-01-31"
    if usual.backend.name != "reference":
        assert choice.passed_over["cpu"] == "w8a8 took 2.00 of the time of reference w16"
    assert "GPU" in choice.passed_over["triton"] and "reference" not in choice.passed_over


def lost(backend: str, monkeypatch) -> dict[str, Backend]:
    """All backends, and one more"""
    found = {**discover()[0], backend: Backend(backend, lambda call: "is out of order", each_call(reference.linear))}
    monkeypatch.setattr(dispatch, "discover", lambda: (found, {}))
    return found


def test_a_backend_that_is_gone_or_refuses_leaves_it_to_the_tables(monkeypatch):
    usual = chosen(compute="auto")
    save([result(backend="gone")], CPU, write_whole)
    choice = choose(SPEC, CPU, FP32, "measured")
    assert (choice.backend.name, choice.compute) == usual and choice.measured is None
    assert choice.passed_over["gone"] == "w16 was the fastest when measured, but: it is not there"
    lost("gone", monkeypatch)
    dispatch.forget_choices()
    assert choose(SPEC, CPU, FP32, "measured").passed_over["gone"].endswith("but: is out of order")


def test_a_backend_that_fails_while_it_runs_leaves_it_to_the_tables(monkeypatch):
    def broken(*call):
        raise RuntimeError("no kernel image")

    found = lost("rival", monkeypatch)
    found["rival"] = Backend("rival", lambda call: -1 if call.measured else "waits", each_call(broken))
    save([result(backend="rival", rows=FEW)], CPU, write_whole)
    assert chosen(rows=FEW) == ("rival", "w16")
    layer, x = random_layer("int4"), torch.randn(5, 256)
    assert torch.equal(svdquant_linear(x, layer, compute="measured"), svdquant_linear(x, layer))
    assert chosen(rows=FEW) == chosen(rows=FEW, compute="auto")
    assert "no kernel image" in choose(SPEC, CPU, FP32, "measured", FEW).passed_over["rival"]


# -- files that are not used


def stored(**changes) -> None:
    """A file of this machine, with some of its facts changed."""
    save([result()], CPU, write_whole)
    whole = json.loads(path().read_text())
    whole[measured.device_name(CPU)] |= changes
    path().write_text(json.dumps(whole))
    new_process()


@pytest.mark.parametrize("fact", FACTS)
def test_what_was_measured_with_something_else_is_not_used_and_says_so_once(fact, caplog):
    stored(**{fact: "another"})
    with caplog.at_level(logging.WARNING, "svdquant"):
        for rows in ROWS:
            assert chosen(rows=rows) == chosen(rows=rows, compute="auto")
    assert len(caplog.records) == 1 and f"{fact} another, now {facts(CPU)[fact]}" in caplog.text
    assert "compute=measured" in caplog.text
    assert rivals.missing([SPEC], CPU, FP32), "and is measured again"
    save([result()], CPU, write_whole)
    new_process()
    assert chosen() == ("reference", "w16")


def test_what_another_gpu_has_measured_stays():
    save([result()], CPU, write_whole)
    whole = json.loads(path().read_text())
    path().write_text(json.dumps({"another GPU": whole[measured.device_name(CPU)]}))
    new_process()
    assert chosen() == chosen(compute="auto")
    save([result()], CPU, write_whole)
    assert json.loads(path().read_text()).keys() == {"another GPU", measured.device_name(CPU)}


def entry(**changes) -> dict:
    whole = json.loads(json.dumps(measured.asdict(result())))
    for key, value in changes.items():
        first, _, second = key.partition("__")
        if second:
            whole[first][second] = value
        else:
            whole[first] = value
    return whole


TIMED = {"backend": "reference", "compute": "w16", "seconds": 1.0, "error": 0.0}
BAD_ENTRIES = {
    "no entry": 1,
    "a key too few": {key: value for key, value in TIMED.items() if key != "error"},
    "another backend than was timed": lambda: entry(backend="cublas"),
    "another mode than was timed": lambda: entry(compute="w4a8"),
    "unknown rows": lambda: entry(kind__rows=100),
    "unknown format": lambda: entry(kind__format="int3"),
    "a number for a truth": lambda: entry(kind__partly_unsigned=1),
    "a text for a number": lambda: entry(kind__n="96"),
    "a truth for a number": lambda: entry(kind__n=True),
    "a wrong way": lambda: entry(timed=[TIMED | {"error": 0.5}]),
    "no time": lambda: entry(timed=[TIMED | {"seconds": 0}]),
    "time that runs back": lambda: entry(timed=[TIMED | {"seconds": -1.0}]),
    "nothing timed": lambda: entry(timed=[]),
    "timed is no list": lambda: entry(timed={}),
    "a reason that is none": lambda: entry(left_out={"a b": 1}),
    "a name that is none": lambda: entry(left_out={"a": "why"}),
}


@pytest.mark.parametrize("fault", BAD_ENTRIES)
def test_an_entry_that_no_run_has_written_is_refused(fault, caplog):
    value = BAD_ENTRIES[fault]
    bad = value() if callable(value) else value
    stored(layers=[entry(), bad])
    with caplog.at_level(logging.WARNING, "svdquant"):
        assert chosen() == chosen(compute="auto")
    assert len(caplog.records) == 1 and str(path()) in caplog.text


DEEP = "[" * 10_000
BAD_FILES = [
    "{",
    DEEP,
    "[]",
    "1" * 5000,
    '{"HERE": 1}',
    '{"HERE": {}}',
    '{"a GPU": {"layers": []}}',
    '{"x": NaN}',
    "\0",
]


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_damaged_file_is_told_once_ignored_and_replaced(text, caplog):
    path().parent.mkdir(parents=True)
    path().write_text(text.replace("HERE", measured.device_name(CPU)))
    with caplog.at_level(logging.WARNING, "svdquant"):
        for rows in ROWS:
            assert chosen(rows=rows) == chosen(rows=rows, compute="auto")
    assert len(caplog.records) == 1 and str(path()) in caplog.text
    save([result()], CPU, write_whole)
    new_process()
    assert chosen() == ("reference", "w16")


def test_a_file_that_cannot_be_read_is_ignored(caplog):
    path().mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "svdquant"):
        assert chosen() == chosen(compute="auto")
    assert len(caplog.records) == 1


def test_nothing_but_compute_measured_reads_it(monkeypatch):
    monkeypatch.setattr(measured, "_read", lambda: pytest.fail("the file was read"))
    for compute in OTHERS:
        choose(SPEC, CPU, FP32, compute)
    with pytest.raises(pytest.fail.Exception):
        choose(SPEC, CPU, FP32, "measured")
