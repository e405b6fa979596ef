"""The INT4 tensor-core route, by numbers that its machine code and its address formulas give."""

import json
from pathlib import Path

import pytest

from svdquant_pack.tests.codegen import pool

TILES = Path(__file__).resolve().parents[2] / "kernels" / "backends" / "triton" / "tiles.json"
PER_ELEMENT = 45  # instructions of the quantizer for each number, the product with the branch included


def elements(case: str) -> float:
    """Numbers that a thread quantizes in one pass of the loop of `quantize_groups-<entry in tiles.json>-...`."""
    settings = json.loads(TILES.read_text())["quantize_groups"][int(case.split("-")[1])]
    return settings["BM"] * 64 / (32 * settings["num_warps"])


def test_the_quantizer_takes_few_instructions():
    listing = pool.listing()
    jobs = [(case, target) for case, target in listing.jobs if case.startswith("quantize_groups") and "int4" in case]
    jobs = [(case, target) for case, target in jobs if target.startswith(("sm_7", "sm_8"))]
    if not jobs:
        pytest.skip(listing.missing or "no case quantizes to int4")
    found = {job: code.loop / elements(job[0]) for job, code in pool.compile_jobs(jobs).items()}
    assert any("every-rule" in case for case, _ in found) and any(target == "sm_75" for _, target in found)
    assert {job: each for job, each in found.items() if not 0 < each <= PER_ELEMENT} == {}
