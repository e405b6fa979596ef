"""What a format, a backend, a dialect and a family of one file each can do: test_drop_in.py runs this in a copy of the
pack that has those four files and no other change.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.kernels import FORMATS, Layer, computes_of, svdquant_linear
from svdquant_pack.kernels.backends import discover
from svdquant_pack.kernels.dispatch import choose
from svdquant_pack.quantize.calibration.file import Statistics
from svdquant_pack.quantize.calibration.tokens import ModelCall
from svdquant_pack.quantize.cli.main import main
from svdquant_pack.quantize.families import FAMILIES
from svdquant_pack.quantize.files.convert import TARGETS, convert_file
from svdquant_pack.quantize.files.describe import inspect_file
from svdquant_pack.quantize.files.dialects import DIALECTS
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.tensor_file import TensorFile

K, WIDE, TOKENS, ROWS = 96, 160, 400, 9  # 96 and 160 are groups of 32, and no multiples of any other format's group
LAYERS = ("towers.0.up", "towers.0.gate", "towers.0.down", "towers.1.up", "towers.1.gate", "towers.1.down")
READS = {"towers.0.gate": "towers.0.up", "towers.1.gate": "towers.1.up"}
RECIPES = ("fast", "balanced")
REFERENCE = 2e-6  # relative: sums in float64 here, in float32 there
SIXTEEN = 1e-5  # relative, fp32 activations
ROUNDED = 0.02  # relative: int8 on both sides


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random model of the dummy family, its statistics, and a 4-bit file by each recipe."""
    folder, generator = tmp_path_factory.mktemp("dummy"), torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).bfloat16()

    tensors = {"norm.weight": torch.ones(K).bfloat16()}
    for tower in ("towers.0", "towers.1"):
        tensors |= {f"{tower}.up.weight": random(WIDE, K), f"{tower}.gate.weight": random(WIDE, K)}
        tensors |= {f"{tower}.down.weight": random(K, WIDE), f"{tower}.down.bias": random(K)}
        tensors |= {f"{tower}.modulation.weight": random(3 * K, 64), f"{tower}.out.weight": random(4, K)}
    save_file(tensors, folder / "model.safetensors")
    widths = {layer: WIDE if layer.endswith("down") else K for layer in LAYERS if layer not in READS}
    statistics = Statistics.create(folder / "statistics.safetensors", widths, TOKENS, {"shared": READS})
    for layer, k in widths.items():
        x = torch.randn(2 * TOKENS, k, generator=generator) * (1 + torch.arange(k) % 7)
        assert statistics.entries[layer].observe(x, ModelCall(0, 1), generator)
    statistics.add_run(id="dummy", steps=1)
    for recipe in RECIPES:
        command = ["quantize", str(folder / "model.safetensors"), str(folder / f"{recipe}.safetensors")]
        command += ["--format", "dummy", "--rank", "16", "--recipe", recipe]
        assert main([*command, "--statistics", str(folder / "statistics.safetensors")]) == 0
    return folder


def layers_of(path: Path):
    """(name, layer, bias) of every layer with 4-bit activations"""
    checkpoint = open_checkpoint(path)
    for name, spec in checkpoint.specs.items():
        if spec.fmt.low_rank:
            bias = f"{name}.bias"
            yield name, checkpoint.layer(name), checkpoint.tensor(bias).float() if bias in checkpoint.rest else None


def activation(layer: Layer) -> torch.Tensor:
    return torch.randn(ROWS, layer.spec.k, generator=torch.Generator().manual_seed(1))


def test_all_four_are_listed(capsys):
    assert "dummy" in FORMATS and "dummy" in discover()[0] and "dummy" in DIALECTS and "dummy" in FAMILIES
    assert "dummy" in TARGETS and computes_of("dummy") == ("auto", "w4a4", "w8a8", "w4a8-jit", "w16", "measured")
    for command, choices in (("quantize", "--format {dummy,"), ("tune", "--format {dummy,"), ("convert", "dummy")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert choices in capsys.readouterr().out, command


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_file_of_the_format_is_written_and_read(folder, recipe):
    found = {name: layer for name, layer, _ in layers_of(folder / f"{recipe}.safetensors")}
    assert tuple(sorted(found)) == tuple(sorted(LAYERS))
    source = load_file(folder / "model.safetensors")
    for name, layer in found.items():
        assert layer.spec.format == "dummy" and "offsets" in layer.tensors
        assert relative(layer.dense_weight(), source[f"{name}.weight"]) < 0.15, name
    assert all(("act_mean" in layer.tensors) == (recipe == "balanced") for layer in found.values())
    specs = open_checkpoint(folder / f"{recipe}.safetensors").specs
    assert {specs[f"towers.{i}.modulation"].fmt.low_rank for i in (0, 1)} == {False}


def test_data_makes_it_better(folder):
    """On tokens like those of the statistics the data-driven recipe is nearer to the model than the data-free one."""
    source, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(2)
    errors = {}
    for recipe in RECIPES:
        for name, layer, bias in layers_of(folder / f"{recipe}.safetensors"):
            generator.manual_seed(2)
            x = torch.randn(200, layer.spec.k, generator=generator) * (1 + torch.arange(layer.spec.k) % 7)
            plain = source.get(f"{name}.bias")
            right = x @ source[f"{name}.weight"].float().T + (0 if plain is None else plain.float())
            errors[recipe, name] = relative(svdquant_linear(x, layer, bias), right)
    assert sum(errors["balanced", name] for name in LAYERS) < sum(errors["fast", name] for name in LAYERS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_auto_takes_the_backend_and_the_reference_agrees(folder, recipe):
    for name, layer, bias in layers_of(folder / f"{recipe}.safetensors"):
        x = activation(layer)
        choice = choose(layer.spec, x.device, x.dtype)
        assert (choice.backend.name, choice.compute) == ("dummy", "w4a4")
        y = svdquant_linear(x, layer, bias)
        assert torch.equal(y, choice.backend.linear(x, layer, bias, None, "w4a4")), name
        assert relative(y, discover()[0]["reference"].linear(x, layer, bias, None, "w4a4")) < REFERENCE, name
        dense = x @ layer.dense_weight().T + (0 if bias is None else bias)
        assert choose(layer.spec, x.device, x.dtype, "w16").backend.name != "dummy"
        assert relative(svdquant_linear(x, layer, bias, compute="w16"), dense) < SIXTEEN, name
        assert relative(svdquant_linear(x, layer, bias, compute="w4a8-jit"), dense) < ROUNDED, name


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's kernels run on a CPU in its interpreter"
)
def test_triton_runs_it_through_the_format_s_own_expansion(folder):
    from svdquant_pack.tests.kernels import interpreter_shim

    interpreter_shim.install()
    backends = discover()[0]
    for name, layer, bias in layers_of(folder / "balanced.safetensors"):
        x = activation(layer)
        for compute, limit in (("w16", SIXTEEN), ("w4a8-jit", SIXTEEN)):
            assert choose(layer.spec, x.device, x.dtype, compute).backend.name == "triton", compute
            right = backends["reference"].linear(x, layer, bias, None, compute)
            assert relative(svdquant_linear(x, layer, bias, compute=compute), right) < limit, (name, compute)


def test_conversion_there_and_back_keeps_every_byte(folder, tmp_path):
    native = folder / "balanced.safetensors"
    there = convert_file(native, tmp_path / "there.safetensors", "dummy")
    assert (there.source_dialect, there.notes) == ("native", ())
    assert any(".dummy_offsets" in name for name in TensorFile(there.path))
    back = convert_file(there.path, tmp_path / "back.safetensors", "native")
    assert back.source_dialect == "dummy"
    before, after = TensorFile(native), TensorFile(back.path)
    assert before.metadata == after.metadata and before.infos == after.infos
    for name in before:
        assert torch.equal(before.read(name).view(torch.uint8), after.read(name).view(torch.uint8)), name


@pytest.mark.parametrize("dialect", ["kitchen", "nunchaku"])
def test_dialects_that_the_format_does_not_name_refuse_it(folder, tmp_path, dialect):
    with pytest.raises(ValueError, match="is dummy, and"):
        convert_file(folder / "fast.safetensors", tmp_path / "x.safetensors", dialect, as_is=True)


def test_inspect_names_them(folder, tmp_path):
    path = convert_file(folder / "fast.safetensors", tmp_path / "x.safetensors", "dummy").path
    found = inspect_file(path)
    assert (found["dialect"], found["family"]) == ("dummy", "dummy")
    assert found["formats"]["dummy"] == len(LAYERS)
