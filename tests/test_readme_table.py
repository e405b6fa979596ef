"""README's table of model families is what the code says."""

from pathlib import Path

from svdquant_pack.tests.readme_table import END, START, render, written

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_table_of_families_is_that_of_the_code():
    found = written(README.read_text())
    assert found is not None, f"README.md needs the lines {START} and {END} where the table belongs"
    assert found == render(), "write it anew: python tests/readme_table.py --write"
