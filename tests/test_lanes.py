"""The lists that decide what a lane runs name things that exist, and CI's folder is the README's."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW = [line for line in (ROOT / "tests" / "slow.txt").read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("entry", SLOW)
def test_a_slow_test_exists(entry):
    """One that was renamed would slip into the fast lane unseen."""
    path, _, name = entry.partition("::")
    assert (ROOT / path).exists()
    assert not name or f"def {name}(" in (ROOT / path).read_text()


def test_every_lane_named_in_the_readme_is_a_target():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"`make ([a-z-]+)`", (ROOT / "tests" / "README.md").read_text())
    assert {"check", "test", "test-oldest"} <= set(named) <= set(targets)


def test_what_the_map_of_mutants_names_exists():
    """A test that was renamed would be left out, or run although it is too slow."""
    named = re.findall(r'"(?:--deselect=)?([\w/.]+\.py)(?:::(\w+))?', (ROOT / "tests" / "mutants.toml").read_text())
    assert len(named) > 20
    for path, name in named:
        assert (ROOT / path).is_file(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), name


def test_the_install_line_names_one_folder():
    """`.ci/run` runs everything in a folder of this name."""
    found = set(re.findall(r"custom_nodes/([A-Za-z0-9._-]+)", (ROOT / "README.md").read_text()))
    assert len(found) == 1 and "-" in found.pop(), "with a dash: what breaks in such a folder is to break in CI"
