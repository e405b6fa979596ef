"""A whole model with statistics: resumable to the byte, within budget, from every kind of source."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.kernels import LayerSpec
from svdquant_pack.quantize.calibration.file import Statistics
from svdquant_pack.quantize.calibration.tokens import ModelCall
from svdquant_pack.quantize.cli.main import main
from svdquant_pack.quantize.families import FAMILIES
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.files.tensor_file import TensorFileError, TensorWriter
from svdquant_pack.quantize.maker import plan
from svdquant_pack.quantize.maker.group import LayerGroup, make_group
from svdquant_pack.quantize.maker.model import BudgetError, Target, quantize_model
from svdquant_pack.quantize.maker.plan import group_layers
from svdquant_pack.quantize.maker.report import write_report
from svdquant_pack.quantize.maths.layer import Dense, Making
from svdquant_pack.quantize.recipe import Recipe

SIZE = 128
LAYERS = [f"blocks.{block}.{name}" for block in range(3) for name in ("attn.q", "attn.k", "mlp")]


def weights(dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"{layer}.weight": torch.randn(SIZE, SIZE, generator=generator).to(dtype) / 8 for layer in LAYERS}
    made |= {f"{layer}.bias": torch.randn(SIZE, generator=generator).to(torch.bfloat16) for layer in LAYERS}
    return made | {"head.weight": torch.randn(8, SIZE, generator=generator).bfloat16()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_file(weights(), path)
    return path


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """q and k of a block share their input, as a family's table would have it."""
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    owners = [layer for layer in LAYERS if not layer.endswith("k")]
    shared = {layer: layer.replace("attn.k", "attn.q") for layer in LAYERS if layer.endswith("k")}
    made = Statistics.create(path, dict.fromkeys(owners, SIZE), 1024, {"family": "generic", "shared": shared})
    generator = torch.Generator().manual_seed(1)
    for place, layer in enumerate(owners):
        gain = torch.exp(torch.randn(SIZE, generator=generator))
        for step in range(8):
            x = torch.randn(2, 64, SIZE, generator=generator) * gain * (1 + place / 4)
            made.entries[layer].observe(x, ModelCall(step, 8, (0, 1), 2), generator)
    made.add_run(id="1", steps=8)
    return Statistics.open(path)


def run(source, path, statistics, progress=None, resume=False, **changes):
    recipe = Recipe.named("balanced", **{"rank": 16, "adam_steps": 8, "rounds": 2, "start_rounds": 1, **changes})
    return quantize_model(FileSource(source), Target(path, resume), recipe, progress, "cpu", statistics)


def stop_after(count):
    def progress(done, total, layer):
        if done == count:
            raise KeyboardInterrupt

    return progress


def test_a_stopped_run_is_taken_up_and_gives_the_same_bytes(source, statistics, tmp_path):
    whole = run(source, tmp_path / "whole.safetensors", statistics)
    target = tmp_path / "target.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(source, target, statistics, stop_after(5), resume=True)
    assert not target.exists() and len(list((tmp_path / ".target.safetensors.work").iterdir())) == 5
    report = run(source, target, statistics, resume=True)
    assert report.resumed == 5 and target.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.safetensors", "target.safetensors"}
    assert report.errors == whole.errors and report.peak_memory >= 0
    assert report.layers["blocks.0.mlp"]["output_error"] < report.layers["blocks.0.mlp"]["plain_error"]


def test_work_of_another_recipe_or_with_damage_is_done_again(source, statistics, tmp_path):
    target = tmp_path / "target.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(source, target, statistics, stop_after(3), resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(source, target, statistics, stop_after(4), resume=True, format="nvfp4")
    work = sorted((tmp_path / ".target.safetensors.work").iterdir())
    assert len(work) == 7
    for file in work:
        file.write_bytes(file.read_bytes()[:-100])
    report = run(source, target, statistics, resume=True)
    assert report.resumed == 0
    run(source, tmp_path / "whole.safetensors", statistics)
    assert target.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_full_disk_leaves_no_half_file_and_the_work(source, statistics, tmp_path, monkeypatch):
    target, real, written = tmp_path / "target.safetensors", TensorWriter.add, []

    def add(self, name, tensor):
        written.append(name)
        if len(written) > 30:
            raise OSError(28, "No space left on device")
        real(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "add", add)
    with pytest.raises(OSError, match="No space left"):
        run(source, target, statistics, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [".target.safetensors.work"]
    monkeypatch.setattr(TensorWriter, "add", real)
    assert run(source, target, statistics, resume=True).resumed >= 4


@pytest.mark.parametrize("with_data", [True, False])
def test_layers_that_share_an_input_share_the_smoothing(source, statistics, tmp_path, monkeypatch, with_data):
    class Sharing(type(FAMILIES["generic"])):
        def shared_groups(self, layers):
            return [tuple(layer for layer in layers if layer.startswith(f"blocks.{i}.attn")) for i in range(3)]

    family = Sharing(**FAMILIES["generic"].__dict__)
    monkeypatch.setitem(FAMILIES, "generic", family)
    monkeypatch.setattr(plan, "detect", lambda keys: family)
    if with_data:
        run(source, tmp_path / "x.safetensors", statistics)
    else:
        quantize_model(FileSource(source), tmp_path / "x.safetensors", Recipe(rank=16))
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    for block in range(3):
        q, k, mlp = (
            checkpoint.layer(f"blocks.{block}.{name}")["smooth_factor"] for name in ("attn.q", "attn.k", "mlp")
        )
        assert torch.equal(q, k) and not torch.equal(q, mlp)
    assert len(group_layers(checkpoint.specs, family)) == 6


def test_making_a_group_is_a_pure_function(source, statistics):
    """The same arguments give the same bytes, and are left as they were; no file is needed."""
    tensors, inputs = weights(), statistics.entry("blocks.1.attn.q")
    spec = LayerSpec("int4", SIZE, SIZE, 16)
    layers = [Dense(tensors[f"{name}.weight"], tensors[f"{name}.bias"], spec) for name in LAYERS[3:5]]
    recipe = Recipe.named("balanced", rank=16, adam_steps=4, rounds=1, start_rounds=1, fallback=1e-3, target_size=10**6)
    group, making = LayerGroup(layers, inputs, widen=True), Making(recipe, torch.bfloat16)
    before = [tensor.clone() for tensor in (inputs.tokens, inputs.absmax, layers[0].weight, layers[0].bias)]
    first, again = make_group(group, making), make_group(group, making)
    after = (inputs.tokens, inputs.absmax, layers[0].weight, layers[0].bias)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) and layers[0].spec.act_bits == 4
    for one, other in zip(first, again, strict=True):
        assert one.layer.spec.act_bits == 8 and one.record["eight"].startswith("output error 0.")
        assert all(torch.equal(one.layer[name], other.layer[name]) for name in one.layer.tensors)
        assert torch.equal(one.bias, other.bias)
        timeless = [{key: value for key, value in made.record.items() if key != "seconds"} for made in (one, other)]
        assert timeless[0] == timeless[1]


def test_auto_rank_takes_the_bytes_of_the_uniform_rank(source, statistics, tmp_path):
    uniform = run(source, tmp_path / "u.safetensors", statistics, rank=32)
    auto = run(source, tmp_path / "a.safetensors", statistics, rank=32, auto_rank=True)
    assert auto.bytes_4bit <= uniform.bytes_4bit and any("weighted alike" in note for note in auto.notes)
    assert open_checkpoint(tmp_path / "a.safetensors").layer("blocks.0.mlp")


def test_the_target_size_is_met_and_an_impossible_one_is_refused(source, statistics, tmp_path):
    size = 1_048_576 + 160_000  # a megabyte is kept for the header
    run(source, tmp_path / "x.safetensors", statistics, target_size=size)
    assert 0.9 * 160_000 < sum(t.nbytes for t in load_file(tmp_path / "x.safetensors").values()) <= size
    with pytest.raises(BudgetError):
        run(source, tmp_path / "y.safetensors", statistics, target_size=1_048_576 + 50_000)
    assert not (tmp_path / "y.safetensors").exists()


def test_layers_above_the_fallback_error_stay_as_they_were(source, statistics, tmp_path):
    report = run(source, tmp_path / "x.safetensors", statistics, fallback=1e-3)
    assert set(report.kept) == set(LAYERS) and "is above 0.001" in report.kept["blocks.0.mlp"]
    assert torch.equal(load_file(tmp_path / "x.safetensors")["blocks.1.mlp.weight"], weights()["blocks.1.mlp.weight"])
    assert not run(source, tmp_path / "y.safetensors", statistics, fallback=0.9).kept


def test_fewer_tokens_than_needed_are_said_and_not_fitted_to(source, tmp_path):
    few = Statistics.create(tmp_path / "s.safetensors", {"blocks.0.mlp": SIZE}, 1024, {"shared": {}})
    few.entries["blocks.0.mlp"].observe(torch.randn(20, SIZE), ModelCall(0, 1), torch.Generator())
    report = run(source, tmp_path / "x.safetensors", few)
    assert report.layers["blocks.0.mlp"]["notes"] == ["made without data: 20 tokens were seen, needed 32"]
    assert "do not hold this layer" in report.layers["blocks.1.mlp"]["notes"][0]


def test_a_wide_layer_gets_a_block_diagonal_hessian_and_the_report_says_so(source, statistics, tmp_path):
    report = run(source, tmp_path / "x.safetensors", statistics, hessian_block=64)
    assert "block-diagonal Hessian of 64 of 128 columns" in report.layers["blocks.0.mlp"]["notes"]


@pytest.mark.parametrize("name", ["svdquant", "svdquant+gptq", "best"])
def test_every_named_recipe_makes_a_file(source, statistics, tmp_path, name):
    recipe = Recipe.named(name, rank=16)
    report = quantize_model(FileSource(source), tmp_path / "x.safetensors", recipe, None, "cpu", statistics)
    assert open_checkpoint(tmp_path / "x.safetensors").provenance.recipe["name"] == name and len(report.errors) == 9


def test_shards_are_one_model(source, tmp_path):
    tensors = list(weights().items())
    for place in range(2):
        save_file(dict(tensors[place::2]), tmp_path / f"m-0000{place + 1}-of-00002.safetensors")
    sharded = FileSource(tmp_path / "m-00002-of-00002.safetensors")
    plain = FileSource(source)
    assert sharded.infos == plain.infos
    assert all(torch.equal(sharded.tensor(key), plain.tensor(key)) for key in plain.infos)
    (tmp_path / "m-00001-of-00002.safetensors").unlink()
    with pytest.raises(TensorFileError, match=r"m-00001-of-00002\.safetensors is not beside it"):
        FileSource(tmp_path / "m-00002-of-00002.safetensors")


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_fp8_is_read_as_what_it_means(tmp_path, suffix, per_row):
    exact, stored = weights(), {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for key, tensor in exact.items():
        if key.startswith("blocks") and key.endswith("weight"):
            scale = tensor.float().abs().amax(1) / 448 if per_row else tensor.float().abs().amax() / 448
            stored[key] = (tensor.float() / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
            stored[key.replace("weight", suffix)] = scale
            stored[key.replace("weight", "scale_input")] = torch.ones(())
            stored[key.replace("weight", "comfy_quant")] = torch.frombuffer(
                bytearray(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8
            )
        else:
            stored[key] = tensor
    save_file(stored, tmp_path / "fp8.safetensors")
    source = FileSource(tmp_path / "fp8.safetensors")
    assert set(source.infos) == set(exact)
    for key, tensor in exact.items():
        read = source.tensor(key)
        assert read.dtype == torch.bfloat16 == source.infos[key].dtype
        assert (read.float() - tensor.float()).norm() < 0.04 * tensor.float().norm()
    assert len(quantize_model(source, tmp_path / "x.safetensors", Recipe(rank=16)).errors) == 9


def test_the_report_and_the_command_line(source, statistics, tmp_path, capsys):
    arguments = ["--rank", "16", "--statistics", str(statistics.path), "--report", str(tmp_path / "report"), "--json"]
    assert main(["quantize", str(source), str(tmp_path / "x.safetensors"), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == 9 and 0 < result["mean_output_error"] < 0.3
    assert main(["inspect", str(statistics.path)]) == 0
    assert "statistics of 6 inputs, family generic, 1 runs" in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "m.safetensors"), str(statistics.path)]) == 0
    assert Statistics.open(tmp_path / "m.safetensors").entries["blocks.0.mlp"].kept == 1024
    assert main(["quantize", str(source), str(tmp_path / "y.safetensors"), "--rank", "twelve"]) == 1
    assert "needed a multiple of 16, or auto" in capsys.readouterr().err
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["measured_layers"] == 9 and len(data["layers"]["blocks.0.mlp"]["by_bucket"]) == 8
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"| {data['worst'][0]} |" in text and "recipe balanced" in text


def test_the_report_without_matplotlib_says_so(source, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    report = quantize_model(FileSource(source), tmp_path / "x.safetensors", Recipe(rank=16))
    written = write_report(report, tmp_path / "report")
    assert [path.name for path in written] == ["report.json", "report.md"]
    assert "No pictures: matplotlib is not installed" in written[1].read_text()
    assert "not measured" in written[1].read_text()


def test_the_report_draws_pictures(source, statistics, tmp_path):
    pytest.importorskip("matplotlib")
    written = write_report(run(source, tmp_path / "x.safetensors", statistics), tmp_path / "report")
    assert sum(path.suffix == ".png" and path.stat().st_size > 5000 for path in written) == 3
