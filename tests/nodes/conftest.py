"""A real ComfyUI inside the test process, on the CPU. Needs COMFYUI_PATH; tests here skip without it."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def _import_host() -> str | None:
    """Make `comfy` importable and start it up as `main.py --cpu` would. Returns why not, or None."""
    path = os.environ.get("COMFYUI_PATH")
    if not path or not (Path(path) / "main.py").is_file():
        return "COMFYUI_PATH does not name a ComfyUI folder; `make test` sets it"
    shims = importlib.util.spec_from_file_location("cpu_shims", ROOT / "tests" / "host" / "cpu_shims.py")
    module = importlib.util.module_from_spec(shims)
    shims.loader.exec_module(module)
    module.install()
    sys.path.insert(0, path)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    return None


MISSING = _import_host()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session")
def demo_file() -> Path:
    return ROOT / "workflows" / "models" / "diffusion_models" / "svdquant_demo_digits.safetensors"


@pytest.fixture(scope="session")
def demo_model(demo_file):
    """The 16-bit demo model as a MODEL."""
    from svdquant_pack.nodes.host.model import load_pinned_model

    return load_pinned_model(str(demo_file))


@pytest.fixture(scope="session")
def checkpoints(demo_model, tmp_path_factory) -> dict[str, Path]:
    """format -> 4-bit checkpoint of the demo model at rank 16; where SVDQUANT_CHECKPOINTS is set, an earlier run's."""
    from svdquant_pack.nodes.host.source import ModelSource
    from svdquant_pack.quantize.maker.model import quantize_model
    from svdquant_pack.quantize.recipe import Recipe

    folder = Path(os.environ.get("SVDQUANT_CHECKPOINTS") or tmp_path_factory.mktemp("checkpoints"))
    made = {format: folder / f"{format}.safetensors" for format in ("int4", "nvfp4")}
    for format, path in made.items():
        if not path.exists():
            quantize_model(ModelSource(demo_model), path, Recipe(format=format, rank=16))
    return made
