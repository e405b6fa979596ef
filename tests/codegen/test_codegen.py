"""Every shipped kernel variant, compiled for every GPU it is shipped for, without having one."""

import ast
from pathlib import Path

import pytest

from svdquant_pack.tests.codegen import budgets, cross, pool, rules


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "job" in metafunc.fixturenames:
        listing = pool.listing()
        skip = pytest.mark.skip(reason=listing.missing or "there are no compile cases")
        jobs = [pytest.param(job, id="-".join(job)) for job in listing.jobs] or [pytest.param(None, marks=skip)]
        metafunc.parametrize("job", jobs)


@pytest.fixture(scope="session")
def compiled(request):
    """All selected jobs, compiled side by side before the first test looks at one."""
    jobs = [item.callspec.params["job"] for item in request.session.items if "job" in getattr(item, "fixturenames", ())]
    return pool.compile_jobs(job for job in jobs if job is not None)


@pytest.fixture
def case(job):
    return pool.listing().cases[job[0]]


def test_machine_code_is_what_is_meant(job, case, compiled):
    """It compiles, fits, does not spill, and uses the instructions it is made for."""
    target, code = job[1], compiled[job]
    assert code.error is None, code.error
    assert code.registers <= cross.register_limit(target)
    assert code.shared <= cross.SHARED_LIMIT[target]
    if target not in case["allow_spills"]:
        assert code.spills == 0, "registers are spilled; a variant that cannot do without has to say why"
    expected = case["expect"].get(target)
    if expected is not None:
        assert any(expected in mnemonic for mnemonic in code.tensor), f"{expected} is not among {code.tensor}"
        assert not code.calls, "an instruction is emulated by a subroutine"
    if case["async_marker"] and target == "sm_90":
        assert code.in_flight, "the main loop waits for all tensor-core instructions in every step"
    assert not (why := rules.complaints(job, code)), "\n".join(why)
    assert (why := budgets.complaint(pool.listing().triton, *job, code.loop)) is None, why


def kernels(path: Path) -> list[str]:
    """Names of the functions in a file that a program is started with: compiled ones that ask for their number."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    compiled = [node for node in functions if any("jit" in ast.unparse(each) for each in node.decorator_list)]
    return [node.name for node in compiled if ".program_id(" in ast.unparse(node)]


def test_every_kernel_has_compile_cases():
    if pool.listing().missing:
        pytest.skip(pool.listing().missing)
    backends = Path(__file__).resolve().parents[2] / "kernels" / "backends"
    written = {name for path in backends.glob("*/*.py") for name in kernels(path)}
    assert written == {case["kernel"] for case in pool.listing().cases.values()}, "see triton_cases.py, gluon_cases.py"


def test_a_spill_that_is_allowed_has_a_reason_and_a_target():
    for name, case in pool.listing().cases.items():
        for target, reason in case["allow_spills"].items():
            assert target in case["targets"] and len(reason) > 20, f"{name} on {target}: {reason!r}"


@pytest.mark.parametrize("known", rules.KNOWN, ids=lambda known: f"{known.rule} {known.cases}")
def test_an_exception_to_a_rule_is_still_needed(known):
    listing = pool.listing()
    if listing.missing:
        pytest.skip(listing.missing)
    covered = [job for job in listing.jobs if rules.known(known.rule, job) is known]
    found = [getattr(code, known.rule) for code in pool.compile_jobs(covered).values()]
    plain = rules.RULES[known.rule][0]
    assert any(value is not None and rules.breaks(known.rule, value, plain) for value in found), "delete it"


def test_a_case_beyond_a_rule_is_complained_of_and_one_without_a_measure_is_not():
    code = cross.Compiled(narrow=1, early=0, resident=1, per_element=45.5)
    found = rules.complaints(("kernel-0", "sm_120"), code)
    assert [text.split(" ", 1)[0] for text in found] == ["1", "1", "45.5"]
    assert rules.complaints(("kernel-0", "gfx942"), cross.Compiled()) == []


def test_no_budget_is_left_of_a_case_that_is_gone():
    listing = pool.listing()
    if listing.missing:
        pytest.skip(listing.missing)
    stored = budgets.load().get(listing.triton, {})
    left = {(case, target) for case, targets in stored.items() for target in targets} - set(listing.jobs)
    assert not left, f"run `{budgets.UPDATE}`"


def test_an_emulated_instruction_is_noticed():
    """INT4 tensor cores end with sm_89: the assembler of sm_90 takes the kernel and calls a subroutine instead."""
    name = next((name for name, case in pool.listing().cases.items() if "IMMA.16864" in case["expect"].values()), None)
    if name is None:
        pytest.skip(pool.listing().missing or "no case uses INT4 tensor cores")
    (code,) = pool.compile_jobs([(name, "sm_90")]).values()
    assert code.error is None and any("mma_sub_byte" in call for call in code.calls)


def test_a_kernel_that_does_not_compile_is_reported_and_not_raised():
    name = next((name for name, case in pool.listing().cases.items() if case["async_marker"]), None)
    if name is None:
        pytest.skip(pool.listing().missing or "no case is asynchronous")
    (code,) = pool.compile_jobs([(name, "sm_75")]).values()
    assert code.error
