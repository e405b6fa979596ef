"""Every family in every dialect that can hold it: loaded by the node on ComfyUI's own model and sampled."""

from pathlib import Path

import pytest

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

import folder_paths

from svdquant_pack.nodes.host.model import load_pinned_model
from svdquant_pack.nodes.host.source import ModelSource
from svdquant_pack.nodes.load_model import SVDQuantLoadModel
from svdquant_pack.quantize.files.checkpoint import CheckpointError
from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.dialects.nunchaku.names import NAME_MAPS
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.sampling import relative

EXACT = 1e-4  # float32 sums in another order, through a whole model and two steps
ROUNDED = 5e-4  # Nunchaku adds 1 to the 16-bit biases of modulation layers, which costs them their last bits
FAMILIES = sorted({model.family: name for name, model in zoo.ZOO.items()}.values())
CASES = [(name, format) for name in FAMILIES for format in ("int4", "nvfp4")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request, tmp_path_factory) -> tuple[str, str, Path]:
    """Name and format of a tiny model, and the folder with its files 16bit and native."""
    name, format = request.param
    if reason := zoo.missing(name):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("zoo")
    source = zoo.save(name, folder / "16bit.safetensors")
    recipe = Recipe(format=format, rank=16, alternations=1)
    quantize_model(ModelSource(load_pinned_model(str(source))), folder / "native.safetensors", recipe)
    yield name, format, folder
    for path in folder.iterdir():
        path.unlink()


def refusal(family: str, format: str, dialect: str) -> str | None:
    """Why a dialect cannot hold a model, by the two rules that there are; None if it has to."""
    if dialect == "kitchen" and format == "nvfp4":
        return "comfy-kitchen has no nvfp4 layer with smoothing and a low-rank branch"
    if dialect == "nunchaku" and family not in NAME_MAPS:
        return f"Nunchaku has no names for family '{family}'"
    return None


@pytest.mark.parametrize("dialect", ["native", "kitchen", "nunchaku"])
def test_a_model_is_the_dense_model_of_its_weights_in_every_dialect(model, dialect, monkeypatch):
    name, format, folder = model
    family, path = zoo.ZOO[name].family, folder / f"{dialect}.safetensors"
    notes = ()
    if dialect != "native":
        if reason := refusal(family, format, dialect):
            with pytest.raises(CheckpointError, match=reason):
                convert_file(folder / "native.safetensors", path, dialect)
            return
        notes = convert_file(folder / "native.safetensors", path, dialect).notes
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(folder)], {".safetensors"}))

    def sampled(file: Path):
        assert SVDQuantLoadModel.VALIDATE_INPUTS(file.name) is True
        return zoo.sample(SVDQuantLoadModel().load(file.name, compute="w16")[0], name)

    checkpoint, found = open_checkpoint(path), sampled(path)
    assert checkpoint.dialect == dialect
    assert relative(found, zoo.sample(zoo.dense(name, folder / "16bit.safetensors", checkpoint), name)) < EXACT
    if dialect != "native":
        modulated = dialect == "nunchaku" and any(spec.format == "awq_w4a16" for spec in checkpoint.specs.values())
        assert relative(found, sampled(folder / "native.safetensors")) < (ROUNDED if modulated else EXACT), notes
