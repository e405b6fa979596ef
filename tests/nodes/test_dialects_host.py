"""Every dialect on ComfyUI's own model: a 4-bit model written in each spelling that can hold it paints the same."""

from pathlib import Path

import pytest

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

from svdquant_pack.nodes.comfy_model import ModelSource, load_model, load_pinned_model
from svdquant_pack.quantize.build import quantize_model
from svdquant_pack.quantize.checkpoint import CheckpointError, open_checkpoint
from svdquant_pack.quantize.convert import convert_file
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.sampling import relative

EXACT = 1e-4  # float32 sums in another order, through a whole model
# Nunchaku adds 1 to the 16-bit biases of FLUX.1's modulation layers, which costs them their last bits
ROUNDED = {("flux", "nunchaku"): 5e-4}
FAMILIES = sorted({model.family: name for name, model in zoo.ZOO.items()}.values())
CASES = [(name, format) for name in FAMILIES for format in ("int4", "nvfp4")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def native(request, tmp_path_factory) -> tuple[str, str, Path]:
    name, format = request.param
    if reason := zoo.missing(name):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("zoo")
    source = zoo.save(name, folder / "16bit.safetensors")
    path = folder / "native.safetensors"
    quantize_model(ModelSource(load_pinned_model(str(source))), path, Recipe(format=format, rank=16, alternations=1))
    source.unlink()
    return name, format, path


@pytest.mark.parametrize("dialect", ["nunchaku", "kitchen"])
def test_a_converted_model_is_the_same_model(native, dialect):
    name, _, path = native
    try:
        report = convert_file(path, path.with_name(f"{dialect}.safetensors"), dialect)
    except CheckpointError as error:
        pytest.skip(f"{dialect} cannot hold it: {error}")
    assert open_checkpoint(report.path).dialect == dialect
    wanted = zoo.forward(load_model(str(path), compute="w16"), name)
    found = zoo.forward(load_model(str(report.path), compute="w16"), name)
    assert relative(found, wanted) < ROUNDED.get((zoo.ZOO[name].family, dialect), EXACT), report.notes
    report.path.unlink()
