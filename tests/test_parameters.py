"""No function takes more than six parameters: what belongs together travels as one object."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "quantize", "nodes")
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
MOST = 6
JIT = ("triton.jit", "gluon.jit")  # a kernel has pointers, sizes and constants, and nothing to group them by
ALLOWED = {  # "file:function" -> who dictates its parameters
    "kernels/ops.py:_run": "a torch operator's schema has tensors, numbers and words, and no objects",
    "nodes/compare_models.py:compare": "ComfyUI calls a node with all its inputs",
    "nodes/quantize_model.py:quantize": "ComfyUI calls a node with all its inputs",
    "nodes/host/linear.py:_load_from_state_dict": "torch.nn.Module's signature",
}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of all parameters but self and cls."""
    given = function.args
    named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in named if name not in ("self", "cls")]


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith(JIT) for decorator in function.decorator_list)


def long_ones(tree: ast.Module) -> dict[str, int]:
    """{function: number of its parameters} of those with more than MOST, kernels left out"""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    counts = [(each.name, len(parameters(each))) for each in functions if not is_kernel(each)]
    return {name: count for name, count in counts if count > MOST}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_function_has_too_many_parameters(path):
    file = path.relative_to(ROOT).as_posix()
    found = long_ones(ast.parse(path.read_text()))
    wrong = {name: count for name, count in found.items() if f"{file}:{name}" not in ALLOWED}
    assert not wrong, f"{file}: {wrong} parameters, allowed are {MOST}; group what belongs together into one object"


def test_what_is_allowed_is_there_and_needs_it():
    for place in ALLOWED:
        file, name = place.split(":")
        assert name in long_ones(ast.parse((ROOT / file).read_text())), f"{place} has at most {MOST} parameters"


def test_all_kinds_of_parameters_are_counted():
    tree = ast.parse("def f(self, a, /, b, c, *, d, e, g, h): ...\n@triton.jit\ndef k(a, b, c, d, e, f, g): ...")
    assert long_ones(tree) == {"f": 7}
