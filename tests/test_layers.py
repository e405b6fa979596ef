"""The architecture, checked on the syntax trees.

Imports point one way and never in a circle, importing does nothing, files stay small.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "quantize", "nodes")
ENTRY_POINT = ROOT / "quantize" / "__main__.py"  # above all layers: it puts the commands of all of them together
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
ALLOWED = {
    "kernels": {"torch", "psutil"},
    "quantize": {"torch", "safetensors", "einops", "huggingface_hub", "matplotlib", "numpy", "gguf", "torchmetrics"},
    "nodes": {"torch", "comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server"},
}
BACKENDS = {"triton", "comfy_kitchen"}  # only inside kernels/backends
BANNED_CALLS = {"print", "eval", "exec", "basicConfig", "__import__"}


def imports(tree: ast.Module, path: Path) -> list[tuple[int, str, str | None]]:
    """(level, first part of the module, our layer or None) of every import in a file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name.split(".")[0], None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.append((0, node.module.split(".")[0], None))
            else:
                folder = path.parents[node.level - 1]
                target = folder.joinpath(*(node.module or "").split(".")).relative_to(ROOT)
                layer = target.parts[0] if target.parts else node.names[0].name
                found.append((node.level, layer, layer))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    layer = LAYERS[-1] if path == ENTRY_POINT else path.relative_to(ROOT).parts[0]
    below = LAYERS[: LAYERS.index(layer) + 1]
    allowed = ALLOWED[layer] | (BACKENDS if "backends" in path.parts else set())
    for level, name, ours in imports(ast.parse(path.read_text()), path):
        if level:
            assert ours in below, f"{layer} imports {ours}: imports point nodes -> quantize -> kernels"
        else:
            assert name in allowed or name in sys.stdlib_module_names, f"{layer} may not import {name}"


def files_read(path: Path) -> set[Path]:
    """Our files that a file imports, wherever in it; not the `__init__.py` of its own folders, which loads it late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                choices = (base / f"{alias.name}.py", base / alias.name / "__init__.py", base / "__init__.py")
                found.add(next((choice for choice in choices if choice.is_file()), base.with_suffix(".py")))
    return {file for file in found if file in FILES and not (file.stem == "__init__" and file.parent in path.parents)}


def circle(reads: dict[Path, set[Path]]) -> list[Path]:
    """The files that are left when those that read nothing more are taken away, again and again; empty without one."""
    left = {path: set(files) for path, files in reads.items()}
    while done := {path for path, files in left.items() if not files & left.keys()}:
        left = {path: files for path, files in left.items() if path not in done}
    return sorted(left)


def test_no_imports_in_a_circle():
    found = circle({path: files_read(path) for path in FILES})
    assert not found, [path.relative_to(ROOT).as_posix() for path in found]


def test_a_circle_would_be_seen():
    a, b, c = (Path(name) for name in "abc")
    assert circle({a: {b}, b: {a}, c: {a}}) == [a, b, c] and not circle({a: {b, c}, b: {c}, c: set()})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_banned_calls_and_no_long_files(path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            assert not (name in BANNED_CALLS and isinstance(node.func, ast.Name)), f"{name}() at line {node.lineno}"
            assert name != "basicConfig", f"the host configures logging, line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except at line {node.lineno}"
    assert len(text.splitlines()) <= 400, "a file is one idea"


def test_importing_the_pack_does_nothing():
    """No CUDA query, no log line, no output, no triton, no network library."""
    code = f"""
import importlib.util, logging, sys
import torch
def forbidden(*a, **k): raise AssertionError("CUDA was queried at import")
torch.cuda.is_available = torch.cuda.get_device_capability = torch.cuda.device_count = forbidden
spec = importlib.util.spec_from_file_location("p", {str(ROOT / "__init__.py")!r})
pack = sys.modules["p"] = importlib.util.module_from_spec(spec)
before = set(logging.root.manager.loggerDict), list(logging.root.handlers)
spec.loader.exec_module(pack)
import p.kernels, p.quantize.maker.model, p.quantize.measure.files, p.quantize.cli.main, p.nodes.remote
assert list(logging.root.handlers) == before[1]
assert pack.NODE_CLASS_MAPPINGS == {{}}
assert not {{"triton", "comfy_kitchen", "requests", "huggingface_hub"}} & set(sys.modules), "a heavy import"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
