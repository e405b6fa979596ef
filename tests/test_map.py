"""MAP.md is complete: every test file says what it tests, by its name or there, and every product module is tested."""

import ast
import fnmatch
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "quantize", "nodes")
TESTS = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
LINE = re.compile(r"\| `(?P<test>[^`]+)` \|(?P<proves>[^|]*)\|(?P<modules>[^|]*)\|")


def modules() -> list[str]:
    """Every product file with more in it than a docstring."""
    paths = [ROOT / "__init__.py", *(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))]
    return [path.relative_to(ROOT).as_posix() for path in paths if len(ast.parse(path.read_text()).body) > 1]


def named_test(module: str) -> str:
    """The test file that is named after a module; a package's is named after its folder."""
    path = Path(module)
    name = path.parent.name if path.stem == "__init__" else path.stem
    return f"tests/{path.parts[0]}/test_{name}.py"


def lines() -> list[tuple[str, str, list[str]]]:
    """(test file, what it proves, patterns of modules) of every line of the map."""
    found = [LINE.fullmatch(line) for line in (ROOT / "tests" / "MAP.md").read_text().splitlines()]
    return [(line["test"], line["proves"].strip(), re.findall("`([^`]+)`", line["modules"])) for line in found if line]


def test_every_test_file_says_what_it_tests():
    listed = {test for test, _, _ in lines()}
    named = {named_test(module) for module in modules()}
    assert not (silent := sorted(TESTS - listed - named)), f"name {silent} after a module, or add a line to MAP.md"


def test_every_module_is_tested():
    patterns = {pattern for _, _, patterns in lines() for pattern in patterns}
    silent = [
        module
        for module in modules()
        if named_test(module) not in TESTS and not any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)
    ]
    assert not silent, f"nothing tests {silent}: add a test named after it, or say in MAP.md where it is tested"


def test_what_the_map_names_is_there():
    listed = [test for test, _, _ in lines()]
    assert len(listed) == len(set(listed)) and not set(listed) - TESTS
    assert all(proves for _, proves, _ in lines())
    known = modules()
    for test, _, patterns in lines():
        for pattern in patterns:
            assert any(fnmatch.fnmatchcase(module, pattern) for module in known), f"{test}: nothing is {pattern}"


def test_the_map_is_read_line_by_line():
    text = (ROOT / "tests" / "MAP.md").read_text()
    assert len(lines()) == sum(line.startswith("| `") for line in text.splitlines()), "a line is not as LINE has it"
