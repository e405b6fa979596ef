"""The host's cache on a real server: what was read or written and is another file now is seen, all else is kept."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.calibration.file import Statistics
from svdquant_pack.quantize.calibration.tokens import ModelCall
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.host.server import ExecutionFailed, Host
from svdquant_pack.tests.quantize.loopback_hub import serving

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "workflows" / "models" / "diffusion_models" / "svdquant_demo_digits.safetensors"
TARGET = "model.safetensors"  # the one that the loopback hub has
pytestmark = pytest.mark.host


def write_source(path: Path, factor: int) -> None:
    """The demo's model with one layer times `factor`: another model, in a file of another size."""
    with safe_open(DEMO, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(DEMO)
    tensors["double_blocks.0.img_mlp.0.weight"] *= factor
    save_file(tensors, path, metadata | {"made": "x" * 64 * factor})


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_source(folder / "source.safetensors", 1)
    quantize_model(FileSource(DEMO), folder / "four_bit.safetensors", Recipe(rank=16, alternations=1))
    with serving((folder / "four_bit.safetensors").read_bytes()) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", address)
        with Host(os.environ["COMFYUI_PATH"], ROOT) as host:
            for name in ("source", "four_bit"):
                shutil.copy(folder / f"{name}.safetensors", host.base / "models" / "diffusion_models")
            yield host


@pytest.fixture
def models(host) -> Path:
    models = host.base / "models" / "diffusion_models"
    (models / TARGET).unlink(missing_ok=True)
    return models


def quantize(**inputs) -> dict:
    inputs = {"source": "source.safetensors", "format": "int4", "rank": 16, "file_name": TARGET, **inputs}
    return {"1": {"class_type": "SVDQuantQuantizeModel", "inputs": inputs}}


def convert(**inputs) -> dict:
    inputs = {"model_name": "four_bit.safetensors", "to": "nunchaku", "file_name": TARGET, **inputs}
    return {"1": {"class_type": "SVDQuantConvertModel", "inputs": inputs}}


def bake(**inputs) -> dict:
    loader = {"class_type": "SVDQuantLoadModel", "inputs": {"model_name": "four_bit.safetensors", "compute": "auto"}}
    inputs = {"model": ["1", 0], "file_name": TARGET, "refit": False, **inputs}
    return {"1": loader, "2": {"class_type": "SVDQuantBakeLora", "inputs": inputs}}


def quantize_model_input(**inputs) -> dict:
    """Of a MODEL that a node of ours has read from source.safetensors."""
    loader = {"class_type": "SVDQuantDemoModel", "inputs": {"model_name": "source.safetensors"}}
    return {"0": loader, **quantize(source="(model input)", model=["0", 0], **inputs)}


def download(**inputs) -> dict:
    inputs = {"published": "(repo and file below)", "repo": "owner/name", "file": TARGET, **inputs}
    return {"1": {"class_type": "SVDQuantDownloadModel", "inputs": inputs}}


def stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_mtime_ns, path.stat().st_ino


@pytest.mark.parametrize("graph", [quantize, convert, bake, download])
def test_a_target_is_kept_while_it_is_there_and_written_again_when_it_is_gone(host, models, graph):
    host.run(graph())
    first, bytes_of = stamp(models / TARGET), (models / TARGET).read_bytes()
    for _ in "12":
        host.run(graph())  # overwrite is off: run again, it would fail
        assert stamp(models / TARGET) == first
    (models / TARGET).unlink()
    host.run(graph())
    second = stamp(models / TARGET)
    assert second != first and (models / TARGET).read_bytes() == bytes_of
    host.run(graph())
    assert stamp(models / TARGET) == second


@pytest.mark.parametrize("graph", [quantize, convert, bake])
def test_a_target_that_is_another_file_now_is_not_taken_for_ours(host, models, graph):
    host.run(graph())
    ours = (models / TARGET).read_bytes()
    (models / TARGET).write_bytes(b"somebody else's")
    with pytest.raises(ExecutionFailed, match="exists already"):
        host.run(graph())
    host.run(graph(overwrite=True))
    assert (models / TARGET).read_bytes() == ours


@pytest.mark.parametrize("dated", ["later", "alike"])
@pytest.mark.parametrize("graph", [quantize, quantize_model_input, convert, bake])
def test_a_source_that_was_replaced_is_seen(host, models, graph, dated):
    """Behind a MODEL as well. A copy may carry the date of what it replaces: then its size tells."""
    name = "source.safetensors" if graph in (quantize, quantize_model_input) else "four_bit.safetensors"
    kept = models / name
    aside = kept.with_suffix(".aside")
    kept.rename(aside)
    shutil.copy(aside, kept)
    try:
        host.run(graph(overwrite=True))
        first, when = (models / TARGET).read_bytes(), stamp(models / TARGET)
        host.run(graph(overwrite=True))
        assert stamp(models / TARGET) == when
        date = kept.stat().st_mtime_ns
        if name == "source.safetensors":
            write_source(kept, 3)
        else:
            quantize_model(FileSource(DEMO), kept, Recipe(rank=32, alternations=1))
        if dated == "alike":
            os.utime(kept, ns=(date, date))
        host.run(graph(overwrite=True))
        assert (models / TARGET).read_bytes() != first
    finally:
        aside.replace(kept)


@pytest.mark.parametrize("graph", [quantize, bake])
def test_what_a_file_is_made_from_is_not_replaced_by_it(host, models, graph):
    name = "source.safetensors" if graph is quantize else "four_bit.safetensors"
    before = (models / name).read_bytes()
    with pytest.raises(ExecutionFailed, match="is the file that this would be made from"):
        host.run(graph(file_name=name, overwrite=True))
    assert (models / name).read_bytes() == before


def test_two_settings_in_turn_write_the_target_each_time(host, models):
    """Whichever cache the host has: what lies there is not what the other settings wrote."""
    files = []
    for rank in (16, 32, 16):
        host.run(quantize(rank=rank, overwrite=True))
        files.append((models / TARGET).read_bytes())
    assert files[0] == files[2] != files[1]


def write_statistics(path: Path, seed: int) -> None:
    """Of one layer, with activations that `seed` draws."""
    layer = "double_blocks.0.img_mlp.0"
    k = FileSource(DEMO).infos[f"{layer}.weight"].shape[1]
    generator = torch.Generator().manual_seed(seed)
    made = Statistics.create(path, {layer: k}, 256, {"family": "flux", "shared": {}})
    gain = torch.exp(torch.randn(k, generator=generator))
    for step in range(4):
        call = ModelCall(step, 4, (0, 1), 2)
        made.entries[layer].observe(torch.randn(2, 64, k, generator=generator) * gain, call, generator)
    made.add_run(id=str(seed), steps=4)


def test_statistics_that_were_replaced_are_seen(host, models):
    file = host.base / "output" / "svdquant" / "some.statistics.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    graph, seen = quantize(statistics_file=file.name, recipe="svdquant", overwrite=True), []
    for seed in (1, None, 2):
        if seed is not None:
            file.unlink(missing_ok=True)
            write_statistics(file, seed)
        host.run(graph)
        seen.append((stamp(models / TARGET), (models / TARGET).read_bytes()))
    assert seen[0] == seen[1] and seen[1][1] != seen[2][1]
