"""The INT4 tensor-core route, by numbers that its machine code and its address formulas give."""

import json
from pathlib import Path

import pytest

from svdquant_pack.tests.codegen import pool

TILES = Path(__file__).resolve().parents[2] / "kernels" / "backends" / "triton" / "tiles.json"
USUAL = ("sm_86", "sm_89")
PER_ELEMENT = 45  # instructions of the quantizer for each number, the product with the branch included


def elements(case: str) -> float:
    """Numbers that a thread quantizes in one pass of the loop of `quantize_groups-<entry in tiles.json>-...`."""
    settings = json.loads(TILES.read_text())["quantize_groups"][int(case.split("-")[1])]
    return settings["BM"] * 64 / (32 * settings["num_warps"])


BLOCKS = 2  # on one multiprocessor of an RTX 30 or 40
REGISTERS, SHARED = 65536, 100 * 1024  # of one
ISSUE = 256  # cycles that the tensor cores take for one group of a warp's tile; a warp's instructions have to fit


@pytest.fixture(scope="module")
def products():
    """{(case, target): machine code} of the tile for many rows where the INT4 tensor cores are used by default"""
    listing = pool.listing()
    jobs = [(case, target) for case, target in listing.jobs if case.endswith("-128x128") and target in USUAL]
    if not jobs:
        pytest.skip(listing.missing or "no case multiplies int4")
    return pool.compile_jobs(jobs)


def test_two_blocks_fit_one_multiprocessor(products):
    """By registers and shared memory; 1 KiB of it is the system's. Eight warps each."""
    for job, code in products.items():
        blocks = min(REGISTERS // (-(-code.registers // 8) * 8 * 256), SHARED // (code.shared + 1024))
        assert blocks >= BLOCKS, (job, code.registers, code.shared)


def test_the_tensor_cores_are_what_the_loop_waits_for(products):
    assert {job: code.loop for job, code in products.items() if not 0 < code.loop <= ISSUE} == {}


def test_the_quantizer_takes_few_instructions():
    listing = pool.listing()
    jobs = [(case, target) for case, target in listing.jobs if case.startswith("quantize_groups") and "int4" in case]
    jobs = [(case, target) for case, target in jobs if target.startswith(("sm_7", "sm_8"))]
    if not jobs:
        pytest.skip(listing.missing or "no case quantizes to int4")
    found = {job: code.loop / elements(job[0]) for job, code in pool.compile_jobs(jobs).items()}
    assert any("every-rule" in case for case, _ in found) and any(target == "sm_75" for _, target in found)
    assert {job: each for job, each in found.items() if not 0 < each <= PER_ELEMENT} == {}
