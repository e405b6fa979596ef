"""Change the code in one place at a time and see whether the tests notice: `make mutants`.

    python tests/mutants.py --python .venv/bin/python [--seed 1] [--draw 300] [--again]

cosmic-ray finds the places, changes them and runs the tests; here is what it does not do: the map from file to tests
(tests/mutants.toml), a copy of the checkout to change, a draw by seed, and the table. A place is drawn, every place of
every file alike, and then one of the changes that are possible there. Drawn are

    cosmic-ray's operators without arguments    other arithmetic, comparison or logic, `not`, numbers one up and one
                                                down, True/False, break/continue, no decorator, another exception, a
                                                loop that never runs
    `Delete`                                    a call, an assignment to an attribute or item, an augmented assignment,
                                                a raise or a bare return is not there

and not drawn is what no test can notice but by its text (annotations, docstrings, the inside of strings) and what no
longer compiles. A mutant is killed if its tests fail or take longer than 60 s. Results are kept in .mutants and a run
that was stopped goes on; `--again` runs the survivors once more, on today's tests. Fails under 90 % killed.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cosmic_ray.plugins
import toml
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_code, use_mutation
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult
from parso.python.tree import Keyword

ROOT = Path(__file__).resolve().parents[1]
TESTS: dict[str, list[str]] = toml.loads((ROOT / "tests" / "mutants.toml").read_text())
SECONDS = 60  # of processor time; a busy machine kills nothing
CLOCK = 600  # by the clock, for what waits for ever
UNCHANGED_SECONDS = 20  # a third: what is stopped has hung
NEEDED = 0.9


class Delete(Operator):
    """Statement -> pass, where that leaves no name without a value."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        if node.parent is not None and node.parent.type == "simple_stmt" and self._is_effect(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return Keyword("pass", node.start_pos, prefix=node.get_first_leaf().prefix)

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("def f():\n    g()\n", "def f():\n    pass\n"),)

    @staticmethod
    def _is_effect(node: Any) -> bool:
        if node.search_ancestor("funcdef") is None:
            return False
        if node.type == "expr_stmt":
            target, sign = node.children[:2]
            return sign.type == "operator" and (sign.value != "=" or target.type == "atom_expr")
        call = node.type == "atom_expr" and node.children[-1].type == "trailer"
        return call or node.type == "raise_stmt" or (node.type == "keyword" and node.value == "return")


class Own:
    """An operator provider, as cosmic-ray's plugins are."""

    def __iter__(self) -> Iterator[str]:
        return iter(["Delete"])

    def __getitem__(self, name: str) -> type[Operator]:
        return {"Delete": Delete}[name]


cosmic_ray.plugins.OPERATOR_PROVIDERS["own"] = Own()


def silent(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(first, last) positions, (line, column), of annotations and strings."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        quiet = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        quiet += [node] if isinstance(node, ast.JoinedStr) else []
        for each in filter(None, quiet):
            spans.append(((each.lineno, each.col_offset), (each.end_lineno or 0, each.end_col_offset or 0)))
    return spans


def compiles(code: str | None, source: str) -> bool:
    if code is None or code == source:
        return False
    with contextlib.suppress(SyntaxError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile(code, "mutant", "exec", dont_inherit=True)
        return True
    return False


def mutations(file: str) -> dict[tuple[Any, ...], list[MutationSpec]]:
    """place -> what can be changed there."""
    source = Path(file).read_text(encoding="utf-8")
    spans, places = silent(source), defaultdict(list)
    with use_db(":memory:", WorkDB.Mode.create) as everything:
        init([Path(file)], everything, {})
        found = [mutation for item in everything.work_items for mutation in item.mutations]
    for one in sorted(found, key=lambda one: (one.start_pos, one.end_pos, one.operator_name, one.occurrence)):
        if not any(start <= one.start_pos < stop for start, stop in spans):
            places[file, one.start_pos, one.end_pos].append(one)
    return places


def draw(seed: int, count: int) -> list[WorkItem]:
    chosen, dice = [], random.Random(seed)
    places = [place for file in sorted(TESTS) for place in mutations(file).items()]
    for (file, (line, column), _end), possible in dice.sample(places, len(places)):
        one, source = dice.choice(possible), Path(file).read_text(encoding="utf-8")
        if compiles(mutate_code(source, cosmic_ray.plugins.get_operator(one.operator_name)(), one.occurrence), source):
            name = f"{file}:{line}:{column + 1} {one.operator_name.partition('/')[2]} {one.occurrence}"
            chosen.append(WorkItem.single(name, one))
        if len(chosen) == count:
            break
    print(f"{len(chosen)} of {len(places)} places, seed {seed}")
    return sorted(chosen, key=lambda item: item.job_id)


def fresh_copy(target: Path) -> None:
    """The files of the checkout, committed or not, without what git ignores."""
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, stdout=-1, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


class Runner:
    """Runs tests in the copy, each time in a fresh copy of a process that has imported what they need."""

    def __init__(self, python: str) -> None:
        self._python, self._servers = python, dict[bool, subprocess.Popen[str]]()

    def run(self, tests: list[str]) -> dict[str, Any]:
        host = any(test.startswith("tests/nodes") for test in tests)
        if host not in self._servers:
            command = [self._python, "tests/fork_pytest.py", *["--host"] * host]
            # ComfyUI's tests begin with making 4-bit models, which takes longer than most of them and is not on trial
            folder = Path("checkpoints").absolute()
            folder.mkdir(exist_ok=True)
            environment = os.environ | {"SVDQUANT_CHECKPOINTS": str(folder)}
            self._servers[host] = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment)
        server = self._servers[host]
        assert server.stdin and server.stdout
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
        print(json.dumps({"arguments": arguments, "cpu": SECONDS, "clock": CLOCK}), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    def try_unchanged(self, files: list[str]) -> None:
        """The tests of these files have to pass, and quickly, before anything is changed."""
        for file in files:
            tests = TESTS[file]
            for _ in range(2):  # the first run also imports
                start, done = time.monotonic(), self.run(tests)
                if done["cpu"] < UNCHANGED_SECONDS:
                    break
            clock = time.monotonic() - start
            print(f"unchanged: {done['cpu']:4.1f} s, {clock:5.1f} by the clock, {file}", flush=True)
            if done["status"] or done["cpu"] > UNCHANGED_SECONDS:
                sys.exit(f"{done['output']}\nthese tests fail, or take more than {UNCHANGED_SECONDS} s, unchanged")


def file_of(item: WorkItem) -> str:
    return item.job_id.partition(":")[0]


def mutate_and_test(item: WorkItem, runner: Runner) -> WorkResult:
    (one,) = item.mutations
    operator = cosmic_ray.plugins.get_operator(one.operator_name)()
    with use_mutation(one.module_path, operator, one.occurrence) as (before, after):
        done = runner.run(TESTS[file_of(item)])
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), n=2, lineterm="")
    return WorkResult(
        worker_outcome=WorkerOutcome.NORMAL,
        output="timeout" if done["timeout"] else done["output"],
        test_outcome=TestOutcome.KILLED if done["status"] else TestOutcome.SURVIVED,
        diff="\n".join(list(diff)[2:]),
    )


def outcome(result: WorkResult) -> str:
    if result.test_outcome == TestOutcome.SURVIVED:
        return "survived"
    return "timeout" if result.output == "timeout" else "killed"


def report(results: dict[str, tuple[str, str]]) -> float:
    """Print the table and the survivors' diffs. results: name -> (outcome, diff). Returns the part that was killed."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for name, (end, diff) in sorted(results.items()):
        table[name.partition(":")[0]][end] += 1
        if end == "survived":
            print(f"\nsurvived: {name}\n{diff}")
    print("\n| file | drawn | killed | of them by time | survived |\n|---|---|---|---|---|")
    table["all"] = sum(table.values(), Counter())
    for file, ends in table.items():
        killed = ends["killed"] + ends["timeout"]
        print(f"| `{file}` | {ends.total()} | {killed} | {ends['timeout']} | {ends.total() - killed} |")
    ends = table["all"]
    return (ends["killed"] + ends["timeout"]) / max(1, ends.total())


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument(
        "--python", required=True, help="the interpreter that has torch, pytest and what the tests need"
    )
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--draw", type=int, default=300)
    options.add_argument("--again", action="store_true", help="run the survivors again")
    given = options.parse_args()
    python = os.path.abspath(given.python)  # noqa: PTH100 (an environment's interpreter is a link, not to be followed)
    sources = hashlib.sha256(b"".join((ROOT / file).read_bytes() for file in sorted(TESTS))).hexdigest()[:12]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, stdout=-1, text=True).stdout.strip()
    work = ROOT / ".mutants"
    session = work / f"{sources}-{given.seed}-{given.draw}.sqlite"
    fresh_copy(work / "pack")
    os.chdir(work / "pack")
    # bytecode that is checked by the source's hash: a changed file is never run as it was
    subprocess.run([python, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "."], check=False)
    with use_db(session) as db:
        if not db.num_work_items:
            db.add_work_items(draw(given.seed, given.draw))
        todo = list(db.pending_work_items)
        if given.again:
            todo += [item for item, result in db.completed_work_items if outcome(result) == "survived"]
        runner = Runner(python)
        runner.try_unchanged(sorted({file_of(item) for item in todo}))
        random.Random(given.seed).shuffle(todo)  # what was run when somebody stops is a draw too
        for index, item in enumerate(todo, 1):
            start, result = time.monotonic(), mutate_and_test(item, runner)
            db.set_result(item.job_id, result)
            end = f"{outcome(result):8} {time.monotonic() - start:5.1f} s"
            print(f"{index}/{len(todo)} {end}  {item.job_id}", flush=True)
        part = report({item.job_id: (outcome(done), done.diff or "") for item, done in db.completed_work_items})
    print(f"{part:.1%} killed, {NEEDED:.0%} needed; commit {commit}, seed {given.seed}, session {session.name}")
    return 0 if part >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
