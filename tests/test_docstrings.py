"""The examples in docstrings run and give what they say, and every function that a user starts from has one."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "quantize")
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
WITH_EXAMPLES = [path for path in FILES if ">>>" in path.read_text()]
OPTIONAL = ("triton", "comfy", "comfy_kitchen")  # a module that needs one of them is skipped where that is not there
SHOWN = (  # module: what has to have an example
    ("kernels", "svdquant_linear"),
    ("kernels.dispatch", "choose"),
    ("kernels.formats", "Format.expand_rows"),
    ("kernels.formats.awq_w4a16", "AwqW4A16.encode_weight"),
    ("kernels.formats.int4", "Int4.encode_weight"),
    ("kernels.formats.int4", "Int4.quantize_activation"),
    ("kernels.formats.nvfp4", "Nvfp4.encode_weight"),
    ("kernels.layer", "Layer"),
    ("kernels.layer", "LayerSpec"),
    ("kernels.layer", "from_blob"),
    ("kernels.layer", "to_blob"),
    ("kernels.packing", "pack"),
    ("kernels.packing", "sign_extend"),
    ("kernels.packing", "unpack"),
    ("quantize.calibration.file", "Statistics"),
    ("quantize.families", "detect"),
    ("quantize.files.convert", "convert_file"),
    ("quantize.files.describe", "inspect_file"),
    ("quantize.files.open", "open_checkpoint"),
    ("quantize.files.source", "FileSource"),
    ("quantize.files.tensor_file", "TensorFile"),
    ("quantize.files.tensor_file", "TensorWriter"),
    ("quantize.linear", "PackedLinear"),
    ("quantize.lora.loras", "LayerLoras"),
    ("quantize.maker.model", "quantize_model"),
    ("quantize.measure.files", "compare_files"),
    ("quantize.recipe", "Recipe"),
    ("quantize.recipe", "Recipe.named"),
)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def load(name: str):
    try:
        return importlib.import_module(f"svdquant_pack.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in OPTIONAL:
            pytest.skip(f"{name} needs {error.name}")
        raise


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=module_of)
def test_examples_give_what_they_say(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # an example may write a file
    failed, tried = doctest.testmod(load(module_of(path)))
    assert tried and not failed, "see the captured output; or the example belongs to something doctest does not find"


@pytest.mark.parametrize(("module", "name"), SHOWN)
def test_what_a_user_starts_from_has_an_example(module, name):
    found = load(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert ">>>" in (found.__doc__ or ""), f"{module}.{name} has no example"
