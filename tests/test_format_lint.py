"""A number format is named in its own file alone: counted on the syntax trees of everything outside kernels/formats.

What else would have to be edited for a new format:

    a string that is a format's name; docstrings do not count
    an import from a format's own file, kernels/formats/X.py
    a branch on which format it is: `.format` or `.name` of a format compared with what is known when the code is
    written (a string, a constant, a collection of them), a format compared by `is`, an isinstance of a format's class

Two layers' formats may be compared with each other, and a name may be looked for in FORMATS.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

from svdquant_pack.kernels.formats import FORMATS

ROOT = Path(__file__).resolve().parents[1]
OWN = ROOT / "kernels" / "formats"
FILES = sorted(
    path
    for layer in ("kernels", "quantize", "nodes")
    for path in (ROOT / layer).rglob("*.py")
    if OWN not in path.parents
)
MODULES = {path.stem for path in OWN.glob("*.py")} - {"__init__"}
CLASSES = {type(fmt).__name__ for fmt in FORMATS.values()}
MOST = 10
ALLOWED = {  # (file, what was found): why
    ("nodes/load_model.py", "'int4'"): "a word that people search nodes for",
    ("nodes/load_model.py", "'nvfp4'"): "a word that people search nodes for",
    ("nodes/quantize_model.py", "'int4'"): "a word that people search nodes for",
    ("nodes/quantize_model.py", "'nvfp4'"): "a word that people search nodes for",
}


def docstrings(tree: ast.Module) -> set[ast.Constant]:
    """Strings that are statements of their own: docstrings, also those below a variable."""
    return {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def is_format(node: ast.expr) -> bool:
    """Whether an expression is a format or its name, as far as its spelling tells."""
    if isinstance(node, ast.Attribute):
        return node.attr in ("format", "fmt") or (node.attr == "name" and is_format(node.value))
    return isinstance(node, ast.Name) and node.id in ("fmt", "format")


def is_known(node: ast.expr) -> bool:
    """Whether a value is known when the code is written: a string, a CONSTANT, an item of one, or a display of them."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return any(map(is_known, node.elts))
    if isinstance(node, ast.Subscript):
        return is_known(node.value) and is_known(node.slice)
    if isinstance(node, ast.Attribute):
        return node.attr.isupper()
    if isinstance(node, ast.Name):
        return node.id.isupper() and node.id != "FORMATS"
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def branches(node: ast.AST) -> bool:
    """Whether this node asks which format something is."""
    if isinstance(node, ast.Match):
        return is_format(node.subject)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
        return any(name in CLASSES for name in names_in(node.args[1])) if len(node.args) > 1 else False
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    if not any(map(is_format, sides)):
        return False
    if any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        return not any(isinstance(side, ast.Constant) and side.value is None for side in sides)
    return any(map(is_known, sides))


def names_in(node: ast.AST) -> set[str]:
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def imported(node: ast.AST) -> set[str]:
    """The formats' files that an import reads."""
    if isinstance(node, ast.ImportFrom) and node.module:
        *folders, last = node.module.split(".")
        if last == "formats":
            return MODULES & {alias.name for alias in node.names}
        return {last} & MODULES if folders[-1:] == ["formats"] else set()
    if isinstance(node, ast.Import):
        return {alias.name.rpartition(".")[2] for alias in node.names if ".formats." in alias.name} & MODULES
    return set()


def found_in(text: str) -> list[tuple[int, str]]:
    """(line, what) of every place that a new format would have to touch."""
    tree = ast.parse(text)
    comments, found = docstrings(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in tuple(FORMATS) and node not in comments:
            found.append((node.lineno, repr(node.value)))
        found += [(node.lineno, f"import of {module}") for module in sorted(imported(node))]
        if branches(node):
            found.append((node.lineno, ast.unparse(node).splitlines()[0]))
    return found


def everything_found() -> Counter[tuple[str, str]]:
    return Counter(
        (path.relative_to(ROOT).as_posix(), what) for path in FILES for _, what in found_in(path.read_text())
    )


def test_no_file_but_its_own_names_a_format():
    found = everything_found()
    unknown = [f"{file}: {what}" for file, what in found if (file, what) not in ALLOWED]
    assert not unknown, "ask the format what it says of itself, or say here why not:\n" + "\n".join(unknown)
    assert sum(found.values()) <= MOST


def test_nothing_is_allowed_that_is_not_there():
    gone = ALLOWED.keys() - everything_found().keys()
    assert not gone, "take these out of ALLOWED"
    assert len(ALLOWED) <= MOST and all(ALLOWED.values())


@pytest.mark.parametrize(
    "line",
    [
        'x = "int4"',
        'x = {"awq_w4a16": 1}',
        'def f(format="nvfp4"): ...',
        "from ..kernels.formats.nvfp4 import E2M1",
        "from ..formats import int4",
        "import pack.kernels.formats.awq_w4a16",
        "if spec.format == DEFAULT: ...",
        "if spec.format != 'svdquant': ...",
        "if layer.spec.fmt.name in ('a', 'b'): ...",
        "if fmt is FORMATS[DEFAULT]: ...",
        "if spec.fmt == OURS: ...",
        "if isinstance(fmt, Nvfp4): ...",
        "if isinstance(fmt, (str, formats.Int4)): ...",
        "match spec.format:\n    case other: ...",
    ],
)
def test_the_lint_bites(line):
    assert found_in(line), line


@pytest.mark.parametrize(
    "line",
    [
        '"""int4"""',
        'x = 1\n"""nvfp4"""',
        'x = "multiplies int4 in int8"',
        "from ..kernels.formats import E2M1_CODE, FORMATS",
        "if spec.format == other.format: ...",
        "if (spec.format, spec.k) != (first.format, first.k): ...",
        "if stated != spec.format: ...",
        "if spec.format not in FORMATS: ...",
        "if fmt is None: ...",
        "if spec.fmt.low_rank and fmt.code == E2M1_CODE: ...",
        "if backend.name == 'reference': ...",
    ],
)
def test_the_lint_lets_pass(line):
    assert not found_in(line), line
