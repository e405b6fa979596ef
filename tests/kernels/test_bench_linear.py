"""The benchmark of the layers runs, checks what it times, and sees a wrong kernel."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svdquant_pack.kernels.backends import cpu
from svdquant_pack.tests.bench import linear_cases

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure the GPU")
def test_it_runs_on_a_cpu(tmp_path):
    table = tmp_path / "linear.csv"
    command = [sys.executable, str(ROOT / "tests/bench/bench_linear.py"), "--quick", "--rows", "2", "--csv", str(table)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert "fastest mode by rows" in done.stdout
    rows = list(csv.DictReader(table.open()))
    modes = {"16bit", "32bit", "w4a4", "w16"} | ({"w8a8", "w4a8-jit"} if cpu.exact() is None else set())
    assert {row["mode"] for row in rows} == modes and all(row["passed"] == "True" for row in rows)
    assert len(rows) == 2 * 3 * 2 * len(modes)  # runs, shapes, formats, modes: the second run is appended


@pytest.mark.parametrize("format", ["int4", "nvfp4", "awq_w4a16"])
def test_every_way_has_its_own_right_answer(format):
    case = linear_cases.Case("any", "any", format, 70, 64, 128)
    data = linear_cases.make_data(case, torch.device("cpu"), torch.float32)
    found = list(linear_cases.ways(case, data))
    assert found[0].mode == "16bit" and len(found) >= (2 if format == "awq_w4a16" else 3)
    for way in found:
        y = linear_cases.checked_rows(way.run())
        assert linear_cases.error_of(y, way.wanted()) <= linear_cases.TOLERANCE
        assert linear_cases.error_of(-y, way.wanted()) > linear_cases.TOLERANCE


def test_the_first_and_the_last_rows_are_checked():
    x = torch.arange(200.0)[:, None]
    rows = linear_cases.checked_rows(x).flatten().tolist()
    assert rows[0] == 0 and rows[-1] == 199 and len(rows) == 2 * linear_cases.CHECKED_ROWS
