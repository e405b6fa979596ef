"""Calibrate, quantize and sample on the real host: what is watched is what the layers receive."""

import shutil

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI: set COMFYUI_PATH")

import folder_paths

from svdquant_pack.kernels import dispatch
from svdquant_pack.kernels.backends import cpu
from svdquant_pack.nodes.bake_lora import SVDQuantBakeLora
from svdquant_pack.nodes.calibrate import SVDQuantCalibrate
from svdquant_pack.nodes.host.bake import bake
from svdquant_pack.nodes.host.files import SUFFIX
from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.nodes.host.source import ModelSource
from svdquant_pack.nodes.host.watch import Collector
from svdquant_pack.nodes.quantize_model import MODEL_INPUT, NO_FILE, SVDQuantQuantizeModel
from svdquant_pack.quantize.calibration.file import Statistics, StatisticsError
from svdquant_pack.quantize.calibration.several import describe
from svdquant_pack.quantize.calibration.tokens import BUCKETS
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.maker.model import QuantizeError, quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.sampling import LORAS, forward, pictures, relative


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Output and model folders of our own."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    (tmp_path / "diffusion_models").mkdir()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths,
        "diffusion_models",
        ([str(tmp_path / "diffusion_models")], {".safetensors"}),
    )
    return tmp_path


@pytest.fixture(scope="module")
def collected(demo_file, tmp_path_factory):
    """Statistics of two runs of the demo model."""
    model = load_pinned_model(str(demo_file))
    path = tmp_path_factory.mktemp("calibrate") / "demo.safetensors"
    with torch.inference_mode():
        collector = Collector.of(model, path, 2048, 10**9, again=False)
        for seed in (1, 2):
            pictures(collector.watch(model), 20, 8, seed)
    return path


def psnr(a, b) -> float:
    return (-10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-10).log10()).mean().item()


def test_every_step_and_layer_is_seen(collected):
    found = describe(collected)
    assert found["family"] == "flux" and len(found["runs"]) == 2 and len(found["layers"]) == 20
    assert all(layer["tokens"] == min(2048, layer["seen"]) for layer in found["layers"].values())
    statistics = Statistics.open(collected)
    for entry in statistics.entries.values():
        assert (entry.count > 0).all() and len(entry.count) == BUCKETS
    # 20 pictures of 16 image tokens, 8 steps, two runs
    assert found["layers"]["double_blocks.0.img_attn.qkv"]["seen"] == 20 * 16 * 8 * 2


def test_the_rows_are_what_the_layer_receives(demo_file, tmp_path):
    model = load_pinned_model(str(demo_file))
    collector = Collector.of(model, tmp_path / "s.safetensors", 65536, 10**9, again=False)
    layer = "single_blocks.1.linear2"
    seen = []
    module = model.model.diffusion_model.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, -2).clone()))
    pictures(collector.watch(model), 4, 4)
    handle.remove()
    rows = torch.cat(seen)
    entry = collector.statistics.entries[layer]
    assert int(entry.count.sum()) == len(rows) and torch.equal(entry.channel_absmax(), rows.abs().amax(0))
    assert not module._forward_pre_hooks, "nothing of ours stays in the model"


def test_the_watched_model_gives_the_same_pictures(demo_model, tmp_path):
    collector = Collector.of(demo_model, tmp_path / "s.safetensors", 64, 10**9, again=False)
    assert torch.equal(pictures(collector.watch(demo_model), 4, 4), pictures(demo_model, 4, 4))


def test_runs_add_up_in_one_file_and_models_do_not_mix(demo_model, checkpoints, tmp_path):
    path = tmp_path / "s.safetensors"
    for expected in (1, 2):
        collector = Collector.of(demo_model, path, 64, 10**9, again=True)
        pictures(collector.watch(demo_model), 2, 2)
        assert len(Statistics.open(path).metadata["runs"]) == expected
    assert not Collector.of(demo_model, path, 64, 10**9, again=False).statistics.metadata["runs"]
    with pytest.raises(ValueError, match="4-bit already"):
        Collector.of(load_model(str(checkpoints["int4"])), path, 64, 10**9, again=True)
    Statistics.create(path, {"other": 8}, 5, {})
    with pytest.raises(StatisticsError, match="another model"):
        Collector.of(demo_model, path, 64, 10**9, again=True)


def test_nan_names_layer_and_step(demo_file, tmp_path):
    model = load_pinned_model(str(demo_file))
    model.model.diffusion_model.double_blocks[1].img_mlp[0].bias.data[3] = float("nan")
    collector = Collector.of(model, tmp_path / "s.safetensors", 64, 10**9, again=False)
    with pytest.raises(StatisticsError, match=r"double_blocks\.1\.img_mlp\.2' receives NaN or Inf at step 1 of 4"):
        pictures(collector.watch(model), 2, 4)
    assert not any(module._forward_pre_hooks for module in model.model.diffusion_model.modules())


def test_sensitivity_is_measured_on_request(demo_model, tmp_path):
    collector = Collector.of(demo_model, tmp_path / "s.safetensors", 64, 10**9, again=False, sensitivity=True)
    pictures(collector.watch(demo_model), 2, 4)
    values = torch.stack([entry.sensitivity for entry in collector.statistics.entries.values()])
    assert (values[:, 1] == 4).all() and (values[:, 0] > 0).all() and values[:, 0].max() > 4 * values[:, 0].min()


def test_repeated_calls_have_their_controlnet(tmp_path):
    """ComfyUI's UNet takes each tensor of a ControlNet out of its list."""
    model, seen = load_pinned_model(str(zoo.save("sdxl", tmp_path / "sdxl.safetensors"))), []
    collector = Collector.of(model, tmp_path / "s.safetensors", 64, 10**9, again=False, sensitivity=True)
    collector.layers = dict(list(collector.layers.items())[:3])
    collector.statistics.begin()

    def look(module, args, kwargs):
        seen.append({name: len(parts) for name, parts in kwargs["control"].items()})

    handle = model.model.diffusion_model.register_forward_pre_hook(look, with_kwargs=True)
    control = {"middle": [torch.zeros(1, 1, 1, 1)], "output": [torch.zeros(1, 1, 1, 1) for _ in range(3)]}
    with torch.inference_mode():
        zoo.forward_wrapped(collector.watch(model), "sdxl", control=control)
    handle.remove()
    assert len(seen) == 1 + 3
    assert all(each == {"middle": 1, "output": 3} for each in seen)
    assert not control["middle"], "the host takes them out no more: the copies can go"


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_statistics_make_better_pictures(demo_model, collected, tmp_path, format):
    exact, found = pictures(demo_model, 20, 8), {}
    for name in ("fast", "balanced"):
        statistics = Statistics.open(collected) if name == "balanced" else None
        recipe = Recipe.named(name, format=format, rank=16)
        path = tmp_path / f"{name}.safetensors"
        report = quantize_model(ModelSource(demo_model), path, recipe, statistics=statistics)
        found[name] = psnr(pictures(load_model(str(path), compute="w4a4"), 20, 8), exact)
    assert found["balanced"] > found["fast"] + 1
    measured = [record["output_error"] for record in report.layers.values() if "output_error" in record]
    assert len(measured) == 20 and max(measured) < 0.1


def test_8_bit_activations_where_the_model_is_sensitive_make_better_pictures(demo_file, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "exact", lambda: "left out: with it every layer has 8 bit")
    monkeypatch.setattr(dispatch, "_chosen", {})
    model, found = load_pinned_model(str(demo_file)), {}
    with torch.inference_mode():
        collector = Collector.of(model, tmp_path / "s.safetensors", 2048, 10**9, again=False, sensitivity=True)
        pictures(collector.watch(model), 20, 8, 1)
    exact = pictures(model, 20, 8)
    for fallback in (0.0, 0.25):
        recipe, path = Recipe.named("balanced", rank=16, fallback=fallback), tmp_path / f"{fallback}.safetensors"
        report = quantize_model(ModelSource(model), path, recipe, statistics=Statistics.open(collector.path))
        found[fallback] = psnr(pictures(load_model(str(path)), 20, 8), exact)
    assert len(report.eight) == 1 and "times what the median layer costs it" in next(iter(report.eight.values()))
    assert "8-bit activations: 1 layers, 9.7% of the multiply-adds" in report.notes
    assert found[0.25] > found[0.0] + 0.4


def test_the_activation_rule_is_stored_and_used(demo_model, collected, tmp_path):
    path = tmp_path / "best.safetensors"
    recipe = Recipe.named("balanced", rank=16, activation="best")
    quantize_model(ModelSource(demo_model), path, recipe, statistics=Statistics.open(collected))
    rules = {spec.act_rule for spec in open_checkpoint(path).specs.values() if spec.fmt.low_rank}
    assert rules == {"signed_extreme"}
    assert pictures(load_model(str(path)), 2, 2).isfinite().all()


def test_the_nodes_in_the_order_of_the_workflow(demo_model, folders):
    with torch.inference_mode():
        watched, statistics = SVDQuantCalibrate().calibrate(demo_model, "demo", 1024, 0.1, False)
        pictures(watched, 10, 4)
        done = SVDQuantQuantizeModel().quantize(
            MODEL_INPUT, "int4", 16, "mine", demo_model, statistics=statistics, after={}
        )
    text, (model, name) = done["ui"]["text"][0], done["result"]
    assert "26 layers of family flux" in text and "mean output error 0.0" in text and name == "mine.safetensors"
    assert pictures(model, 2, 2).isfinite().all()
    report = folders / "output" / "svdquant" / "mine.report"
    assert (report / "report.md").read_text().startswith("# mine.safetensors") and (report / "report.json").exists()
    assert open_checkpoint(folders / "diffusion_models" / name).provenance.recipe["name"] == "balanced"
    assert [path.name for path in (folders / "diffusion_models").iterdir()] == [name]


def test_a_lora_is_baked_nearer_by_statistics(demo_model, collected, folders):
    """At the rank that the file has; through the node, and the loss it states is of tokens it was not fitted to."""
    import comfy.sd
    import comfy.utils

    path = folders / "int4.safetensors"
    quantize_model(ModelSource(demo_model), path, Recipe(rank=16))
    lora = comfy.utils.load_torch_file(str(LORAS / "svdquant_demo_inverted_kohya.safetensors"), safe_load=True)
    strong = comfy.sd.load_lora_for_models(load_model(str(path), compute="w16"), None, lora, 1.0, 0)[0]
    wanted, errors = forward(strong), {}
    (folders / "output" / "svdquant").mkdir(parents=True)
    name = f"demo{SUFFIX}"
    shutil.copy(collected, folders / "output" / "svdquant" / name)
    for known in (NO_FILE, name):
        done = SVDQuantBakeLora().bake(strong, f"baked {known}", True, statistics_file=known)
        baked = folders / "diffusion_models" / done["result"][1]
        assert "20 layers have the LoRAs inside" in done["ui"]["text"][0]
        errors[known] = relative(forward(load_model(str(baked), compute="w16")), wanted)
    assert errors[name] < 0.9 * errors[NO_FILE], errors
    wrong = Statistics.create(folders / "s.safetensors", {"double_blocks.0.img_attn.qkv": 64}, 8, {})
    with pytest.raises(StatisticsError, match="statistics of another model"):
        bake(strong, folders / "x.safetensors", True, statistics=wrong)


def test_statistics_of_another_model_are_refused(demo_model, tmp_path):
    wrong = Statistics.create(tmp_path / "s.safetensors", {"double_blocks.0.img_attn.qkv": 64}, 8, {})
    with pytest.raises(StatisticsError, match="statistics of another model"):
        quantize_model(
            ModelSource(demo_model), tmp_path / "x.safetensors", Recipe.named("balanced"), None, "cpu", wrong
        )
    with pytest.raises(QuantizeError, match="needs statistics"):
        quantize_model(ModelSource(demo_model), tmp_path / "x.safetensors", Recipe.named("balanced"))
