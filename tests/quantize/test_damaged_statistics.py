"""Statistics that no run can have written are refused by file, layer and part; what they led to ends by itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.kernels.layer import LayerError
from svdquant_pack.quantize.calibration.file import Statistics, StatisticsError
from svdquant_pack.quantize.calibration.several import describe, merge
from svdquant_pack.quantize.calibration.tokens import ModelCall
from svdquant_pack.quantize.cli.quantizer import inspect_statistics
from svdquant_pack.quantize.files.tensor_file import TensorFile
from svdquant_pack.quantize.maths.inputs import Gram
from svdquant_pack.quantize.maths.rounding import factorize

BAD = float("nan"), float("inf")


@pytest.fixture
def damaged(tmp_path):
    """(part, change) -> a statistics file in which that part of layer `a` is changed"""
    path = tmp_path / "s.safetensors"
    statistics = Statistics.create(path, {"a": 64}, 16, {"family": "flux", "runs": []})
    x = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    statistics.entries["a"].observe(x, ModelCall(0, 4), torch.Generator().manual_seed(0))
    statistics.save()

    def change(part, edit):
        tensors, metadata = load_file(path), TensorFile(path).metadata
        changed = edit(tensors.pop(f"a.{part}"))
        save_file(tensors | ({} if changed is None else {f"a.{part}": changed}), path, metadata)
        return path

    return change


def first(value):
    def edit(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return edit


@pytest.mark.parametrize("part", ["tokens", "key", "stratum", "hold", "absmax", "square", "count", "sensitivity"])
@pytest.mark.parametrize(
    "edit", [lambda t: None, lambda t: t[:-1].clone(), lambda t: t[None].clone(), lambda t: t.double()]
)
def test_a_part_of_another_form_is_refused_on_opening(damaged, part, edit):
    with pytest.raises(StatisticsError, match=r"^s.safetensors: layer 'a': "):
        Statistics.open(damaged(part, edit))


@pytest.mark.parametrize(
    ("part", "value"),
    [(part, bad) for part in ("tokens", "key", "absmax", "square", "sensitivity") for bad in BAD]
    + [("tokens", 3e38), ("tokens", -3e38), ("key", 1.5), ("key", -0.5), ("stratum", 64), ("stratum", -1)]
    + [("hold", 2), ("hold", 7), ("count", -1), ("absmax", -1), ("square", -1)],
)
def test_numbers_that_no_run_has_written_are_refused_when_used(damaged, part, value):
    statistics = Statistics.open(damaged(part, first(value)))
    with pytest.raises(StatisticsError, match=rf"^s.safetensors: layer 'a': {part} holds"):
        statistics.of_group(["a"])


@pytest.mark.parametrize("shape", [(16,), (1, 16, 64), (0, 64), (16, 0)])
def test_tokens_are_rows_of_channels(damaged, shape):
    path = damaged("tokens", lambda t: torch.zeros(shape, dtype=t.dtype))
    with pytest.raises(StatisticsError, match=rf"tokens is of shape {re.escape(str(shape))}, needed \(tokens, ch"):
        Statistics.open(path)


def test_what_a_run_has_written_is_used(damaged):
    assert Statistics.open(damaged("tokens", lambda t: t)).entry("a").kept == 16


def test_an_entry_is_looked_at_once(damaged, monkeypatch):
    """Its numbers are read anew each time that it is asked for; whether they make sense is known by then."""
    from svdquant_pack.quantize.calibration import file

    seen, check = [], file._check_values
    monkeypatch.setattr(file, "_check_values", lambda *args: (seen.append(args[1]), check(*args)))
    path = damaged("tokens", lambda t: t)
    statistics = Statistics.open(path)
    assert statistics.entry("a") is not statistics.entry("a") and seen == ["a"]
    assert Statistics.open(path, writable=True).entry("a").kept == 16 and seen == ["a"], "a run has written it"


@pytest.mark.parametrize("bad", [*BAD, -1e9])
def test_a_hessian_that_has_no_factor_ends_with_an_error(bad):
    """It was damped for ever: NaN plus a damping is NaN."""
    block = torch.eye(64)
    block[3, 5] = block[5, 3] = bad
    for work in (factorize, lambda gram: gram.root(0.01)):
        try:
            made = work(Gram((0,), (block.clone(),)))
        except LayerError as error:
            assert "second moments" in str(error)
            continue
        assert bad == -1e9 and made  # dampings that rise are enough for this one
    block[7, 7] = bad
    for work in (factorize, lambda gram: gram.root(0.01)):
        if bad != -1e9:
            with pytest.raises(LayerError, match="not finite"):
                work(Gram((0,), (block.clone(),)))


def fill(path, run=0):
    """A file of two layers in which one run has ended."""
    statistics = Statistics.create(path, {"a": 64, "b": 32}, 16, {"family": "flux", "runs": []})
    observe(statistics, run)
    statistics.add_run(id=f"{run}", steps=4)
    return statistics


def observe(statistics, run):
    generator = torch.Generator().manual_seed(run)
    for layer, k in statistics.widths.items():
        statistics.entries[layer].observe(torch.randn(1, 32, k, generator=generator), ModelCall(0, 4), generator)


def flip(path, name):
    """One bit of a tensor, as a disk does it"""
    raw = bytearray(path.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8 : 8 + size])[name]["data_offsets"][0]
    raw[8 + size + start] ^= 1
    path.write_bytes(raw)


def test_a_flipped_bit_is_refused_by_layer_and_part(tmp_path):
    """Any number of statistics is as likely as its neighbour: only a checksum sees it."""
    path = fill(tmp_path / "s.safetensors").path
    assert Statistics.open(path).has_checksums and Statistics.open(path).finished
    flip(path, "b.square")
    statistics = Statistics.open(path)
    assert statistics.entry("a").kept == 16
    with pytest.raises(StatisticsError, match=r"s\.safetensors: tensor b\.square is not what was written.*calibrate"):
        statistics.entry("b")
    with pytest.raises(StatisticsError, match=r"b\.square"):  # a run would add to it, and make it look right
        Statistics.open(path, writable=True)


def test_an_unfinished_file_is_no_damaged_one(tmp_path):
    """A killed run leaves it: it says so, can be read, and the next run goes on."""
    statistics = fill(tmp_path / "s.safetensors")
    reader = Statistics.open(statistics.path)
    statistics.begin()
    observe(statistics, 1)
    with pytest.raises(StatisticsError, match=r"s\.safetensors: a run is writing it"):
        reader.entry("a")
    left = Statistics.open(statistics.path)
    assert not left.finished and not left.has_checksums and not describe(left.path)["finished"]
    assert "was stopped while it did" in inspect_statistics(left.path)[1]
    assert int(left.entry("a").count.sum()) == 64
    again = Statistics.open(statistics.path, writable=True)
    again.begin()
    again.add_run(id="2", steps=4)
    done = Statistics.open(statistics.path)
    assert done.finished and done.has_checksums and done.entry("b").kept == 16
    assert not Statistics.open(Statistics.create(tmp_path / "new.safetensors", {"a": 64}, 16, {}).path).finished


def test_a_merge_that_fails_leaves_the_older_file(tmp_path):
    one, two = fill(tmp_path / "1.safetensors", 1).path, fill(tmp_path / "2.safetensors", 2).path
    merged = merge([one, two], tmp_path / "m.safetensors")
    assert merged.finished and merged.has_checksums
    before = merged.path.read_bytes()
    flip(two, "a.tokens")
    with pytest.raises(StatisticsError, match=r"a\.tokens"):
        merge([one, two], merged.path)
    assert merged.path.read_bytes() == before and len(list(tmp_path.iterdir())) == 3


CUT_SHORT = """
import os, sys
sys.path.insert(0, {tests!r})
import conftest
from svdquant_pack.quantize.calibration.file import Statistics, StatisticsError
statistics = Statistics.open({path!r})
os.truncate({path!r}, os.path.getsize({path!r}) // 4)
try:
    statistics.of_group(["b"])
except StatisticsError as error:
    print("refused", error)
"""


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="Windows does not let an open file be cut short")
def test_a_file_cut_short_after_opening_is_an_error_and_no_signal(tmp_path):
    path = Statistics.create(tmp_path / "s.safetensors", {"a": 4096, "b": 4096}, 64, {}).path
    script = CUT_SHORT.format(tests=str(Path(__file__).resolve().parents[1]), path=str(path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.startswith("refused s.safetensors: b."), (done.returncode, done.stderr)
    assert "ends early" in done.stdout


HEADERS = {
    "no object": ("[1]", "statistics in the header"),
    "no JSON": ("{", "statistics in the header"),
    "no version": ('{"family": "flux"}', "statistics of version None, this pack reads 1"),
    "a version that never was": ('{"version": 0, "family": "flux"}', "statistics of version 0, this pack reads 1"),
    "another version": ('{"version": 2, "family": "flux"}', "statistics of version 2, this pack reads 1"),
    "shared with a number": (
        '{"version": 1, "family": "flux", "shared": {"b": "a", "c": 3}}',
        "shared in the header holds more than names",
    ),
    "a run without a name": (
        '{"version": 1, "family": "flux", "runs": [{"id": "1"}, {"steps": 4}]}',
        "records of runs",
    ),
    "a run that is a list": ('{"version": 1, "family": "flux", "runs": [["id"]]}', "records of runs"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_no_run_has_written_is_refused_on_opening(damaged, name):
    text, words = HEADERS[name]
    path = damaged("tokens", lambda t: t)
    save_file(load_file(path), path, {"statistics": text})
    with pytest.raises(StatisticsError, match=rf"^s.safetensors: .*{words}"):
        Statistics.open(path)


def test_a_tensor_that_is_no_part_is_named(damaged):
    path = damaged("tokens", lambda t: t)
    save_file(load_file(path) | {"a.other": torch.ones(3)}, path, TensorFile(path).metadata)
    with pytest.raises(StatisticsError, match=r"^s.safetensors: a.other is no part of statistics"):
        Statistics.open(path)
