"""README's tables are what the code says: the families, and the tests of what happens when something goes wrong."""

import re
from pathlib import Path

import pytest

from svdquant_pack.tests.readme_table import END, START, render, written

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PROMISE = re.compile(r"\| (?P<when>[^|]+) \| (?P<then>[^|]+) \| \[`(?P<test>\w+)`\]\((?P<file>tests/[\w/]+\.py)\) \|")


def promises() -> list[re.Match]:
    """The rows of the table under "What happens when ...": a row of another form is none."""
    section = README.read_text().split("## What happens when ...\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    found = [PROMISE.fullmatch(line) for line in lines]
    assert lines and all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return found


def test_the_table_of_families_is_that_of_the_code():
    found = written(README.read_text())
    assert found is not None, f"README.md needs the lines {START} and {END} where the table belongs"
    assert found == render(), "write it anew: python tests/readme_table.py --write"


@pytest.mark.parametrize("promise", promises(), ids=lambda promise: promise["test"])
def test_every_promise_names_a_test_that_is_there(promise):
    file = ROOT / promise["file"]
    assert file.name.startswith("test_") and f"def {promise['test']}(" in file.read_text()


def test_the_promises_are_short_and_each_is_made_once():
    rows = promises()
    assert len(rows) <= 30 and all(len(row["when"]) <= 100 and len(row["then"]) <= 120 for row in rows)
    assert len({row["when"] for row in rows}) == len({row["test"] for row in rows}) == len(rows)
