"""Compiles in a process of its own: `python worker.py` reads one job per line and answers one line of JSON each.

A process of its own because the interpreter tests switch triton into another mode for the whole process, because the
compiler is not thread-safe, and because PYTHONPATH can then name another triton.

    (first line out)  {"triton": version, "cases": {name: {"kernel": "gemm_w4", "targets": [...], ...}}}
                      or {"missing": why there is no triton}
    case target       {"error": ..., "registers": ..., ...}
"""

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
TOLD = ("targets", "expect", "allow_spills", "async_marker")  # what the tests need to know of a case


def compile_cases() -> dict:
    """{name: CompileCase} of every kernel; for the processes that may import triton"""
    from svdquant_pack.tests.codegen import gluon_cases, triton_cases

    cases = {}
    for case in (*triton_cases.cases(), *gluon_cases.cases()):
        if case.name in cases:
            raise ValueError(f"two compile cases are called {case.name!r}")
        cases[case.name] = case
    return cases


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    conftest = Path(__file__).resolve().parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("svdquant_conftest", conftest)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    try:
        import triton
    except ImportError as error:
        answers.write(json.dumps({"missing": f"triton cannot be imported: {error}"}) + "\n")
        return
    from svdquant_pack.tests.codegen.cross import compile_case

    cases = compile_cases()
    told = {name: {field: getattr(case, field) for field in TOLD} for name, case in cases.items()}
    for name, case in cases.items():
        told[name]["kernel"] = case.kernel.fn.__name__
    answers.write(json.dumps({"triton": triton.__version__, "cases": told}) + "\n")
    for line in sys.stdin:
        name, target = line.split()
        answers.write(json.dumps(dataclasses.asdict(compile_case(cases[name], target))) + "\n")


if __name__ == "__main__":
    main()
