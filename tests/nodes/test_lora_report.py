"""The report, the baked checkpoint, and files that are not what they should be."""

import json
import logging

import pytest
import torch

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

from svdquant_pack.nodes.bake_lora import SVDQuantBakeLora
from svdquant_pack.nodes.host.bake import bake
from svdquant_pack.nodes.host.lora_report import describe_loras
from svdquant_pack.nodes.host.model import load_model
from svdquant_pack.nodes.lora_info import SVDQuantLoraInfo
from svdquant_pack.nodes.lora_limits import SVDQuantLoraLimits
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.lora.deltas import LoraError
from svdquant_pack.quantize.lora.fit import LoraLimits
from svdquant_pack.tests.nodes.lora_files import as_file, lora_of, slices_of, tensors_of, with_file
from svdquant_pack.tests.nodes.sampling import forward, relative

ROUNDED = 2e-2  # the baked factors are stored in bfloat16: 8 bits of a branch that is a tenth of the weight


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def plain(request, checkpoints):
    return load_model(str(checkpoints[request.param]), compute="w16")


@pytest.fixture(scope="module")
def weights(plain):
    layers = plain.packed_layers().items()
    return {key: module.packed.layer(module.weight.detach()).dense_weight() for key, module in layers}


def text_of(patcher) -> str:
    return SVDQuantLoraInfo().describe(patcher)["result"][0]


def test_the_report_has_a_row_per_lora(plain, weights, demo_model):
    first = with_file(plain, lora_of(("lora", "lokr", "dora_out"), weights), 0.7)
    other = {"diffusion_model.img_in.diff": torch.ones(128, 64), "diffusion_model.img_in.diff_b": torch.ones(128)}
    second = with_file(first, {**lora_of(("diff",), weights, 1), **other}, -0.25)
    found = describe_loras(second)
    assert [row["strength"] for row in found["rows"]] == [0.7, -0.25]
    assert [row["file"] for row in found["rows"]] == [None, None], "no loader node has run"
    kinds = found["rows"][0]["kinds"]
    assert set(kinds) == {"lora", "lokr", "lora with DoRA"}
    assert sum(kinds.values()) == len(weights)
    assert len(found["rows"][1]["layers"]) == len(weights)
    assert found["rows"][1]["other"] == ["diffusion_model.img_in.bias", "diffusion_model.img_in.weight"]
    assert found["layers"] == found["of"] == len(weights)
    assert found["columns"] == sum(loras.rank for loras in second.layer_loras().values())
    text = text_of(second)
    assert "LoRA 1" in text and "-0.25" in text and "total:" in text
    assert text_of(plain) == "This MODEL has no LoRA."
    assert "not 4-bit" in text_of(demo_model)


def test_slices_of_one_block_count_as_one_row_per_file(plain):
    found = describe_loras(with_file(plain, slices_of(plain), 1.0))
    assert len(found["rows"]) == 1
    assert found["rows"][0]["kept"] == 1
    assert found["rows"][0]["columns"] == found["columns"]


def test_the_report_says_what_is_kept_and_what_is_refused(plain, weights):
    key, weight = next(iter(weights.items()))
    full = {key.removesuffix("weight") + "diff": torch.randn_like(weight)}
    (loose,) = SVDQuantLoraLimits().limit(with_file(plain, full, 1.0), 32, 1.0)
    row = describe_loras(loose)["rows"][0]
    assert 0.3 < row["kept"] < 0.99
    assert f"{row['kept']:.4%}" in text_of(loose)
    (strict,) = SVDQuantLoraLimits().limit(loose, 32, 0.01)
    assert "cannot be applied: 1 4-bit layers" in text_of(strict)
    assert describe_loras(loose)["refused"] is None, "the limits are the clone's"


def test_unmatched_keys_are_named_once_with_their_neighbours(plain, caplog):
    made = tensors_of("lora", torch.ones(128, 128), 0)
    adapter_keys = {
        "diffusion_model.double_blocks.0.img_attn.proj.weight",
        "diffusion_model.double_blocks.9.img.weight",
    }
    from comfy.weight_adapter import LoRAAdapter

    adapter = LoRAAdapter(set(), (made["lora_up.weight"], made["lora_down.weight"], None, None, None, None))
    patched = plain.clone()
    with caplog.at_level(logging.WARNING, logger="svdquant"):
        patched.add_patches(dict.fromkeys(adapter_keys, adapter))
        patched.add_patches(dict.fromkeys(adapter_keys, adapter))
    said = [record.getMessage() for record in caplog.records if record.name == "svdquant"]
    assert len(said) == 1
    assert "double_blocks.9.img.weight (nearest: diffusion_model.double_blocks." in said[0]
    assert "1 keys found no place" in text_of(patched)


def exact_mix(weights):
    """LoRAs that a low-rank branch can hold without loss, on every layer, biases and 16-bit layers included."""
    mix = lora_of(("lora", "loha", "lokr_low", "glora"), weights)
    other = {"diffusion_model.img_in.diff": 0.1 * torch.randn(128, 64)}
    biases = {
        key.removesuffix(".weight") + ".diff_b": 0.1 * torch.randn(weight.shape[0]) for key, weight in weights.items()
    }
    return {**mix, **other, **biases}


@pytest.mark.parametrize("refit", [False, True])
def test_the_baked_file_is_the_patched_model(plain, weights, tmp_path, refit):
    strong = with_file(plain, exact_mix(weights), 0.8)
    wanted = forward(strong)
    seen = []
    report = bake(strong, tmp_path / "baked.safetensors", refit, lambda *step: seen.append(step))
    assert report.layers == len(weights) == len(seen)
    modulation = {name for name in report.dense if "mod" in name}
    assert len(modulation) == len(report.dense) == 6, "a layer without a low-rank branch takes its LoRA in 16 bit"
    baked, base = open_checkpoint(report.path), plain.packed_layers()
    for name, spec in baked.specs.items():
        module = base[f"diffusion_model.{name}.weight"]
        old, new = module.packed.layer(module.weight.detach()), baked.layer(name)
        assert all(torch.equal(old[part], new[part]) for part in old.tensors if not part.startswith("proj_"))
        assert (spec.rank == module.packed.spec.rank) == refit
    found = relative(forward(load_model(str(report.path), compute="w16")), wanted)
    moved = relative(forward(plain), wanted)
    assert moved > 0.05
    if refit:
        assert 0.01 < report.lost < 1
        assert found < moved
    else:
        assert report.lost < 1e-5
        assert found < ROUNDED
    assert torch.equal(forward(strong), wanted), "the MODEL itself is as it was"


def test_baking_what_no_branch_can_hold_is_refused_and_leaves_no_file(plain, weights, tmp_path):
    strong = with_file(plain, lora_of(("lokr",), weights), 1.0)
    strong.set_lora_limits(LoraLimits(max_rank=16))
    with pytest.raises(LoraError, match=r"double_blocks\.0\.img_attn\.\w+: .*nearest 16 columns keep"):
        bake(strong, tmp_path / "baked.safetensors")
    assert not list(tmp_path.iterdir())


class Stopped(Exception):
    pass


def test_a_stopped_bake_leaves_the_old_file(plain, weights, tmp_path):
    path = tmp_path / "baked.safetensors"
    path.write_bytes(b"old")

    def stop(done, total, layer):
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        bake(with_file(plain, lora_of(("lora",), weights), 1.0), path, progress=stop)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_bake_node_writes_once(plain, weights, tmp_path, monkeypatch):
    import folder_paths

    folder = tmp_path / "diffusion_models"
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(folder)])
    strong = with_file(plain, lora_of(("lora",), weights), 1.0)
    done = SVDQuantBakeLora().bake(strong, "with_lora", refit=False)
    assert done["result"][1] == "with_lora.safetensors"
    assert f"{len(weights)} layers have the LoRAs inside" in done["ui"]["text"][0]
    with pytest.raises(ValueError, match="exists already"):
        SVDQuantBakeLora().bake(strong, "with_lora", refit=False)
    assert "needed a name inside" in SVDQuantBakeLora.VALIDATE_INPUTS("../x")
    recipe = open_checkpoint(folder / "with_lora.safetensors").provenance.recipe
    assert json.loads(json.dumps(recipe))["baked_loras"] == 1


KEY = "diffusion_model.double_blocks.0.img_attn.proj"


def bad_files() -> dict[str, tuple[dict[str, torch.Tensor], type[Exception], str]]:
    """what is wrong -> (file, exception, words)"""
    good = {f"{KEY}.{name}": t for name, t in tensors_of("lora", torch.ones(128, 128), 0).items()}
    wide = {f"{KEY}.{name}": t for name, t in tensors_of("lora", torch.ones(256, 64), 0).items()}
    torn = {name: t[:, :3] if "up" in name else t for name, t in good.items()}
    nan = {name: t * float("nan") for name, t in good.items()}
    lokr = {f"{KEY}.{name}": t for name, t in tensors_of("lokr", torch.ones(128, 64), 0).items()}
    loha = {f"{KEY}.{name}": t for name, t in tensors_of("loha", torch.ones(64, 128), 0).items()}
    dora = {**good, f"{KEY}.dora_scale": torch.ones(7, 1)}
    oft = {f"{KEY}.oft_blocks": torch.ones(5, 9, 9)}
    named = r"double_blocks\.0\.img_attn\.proj: "
    return {
        "shape of another model": (wide, LoraError, named + ".*another model"),
        "ranks that differ": (torn, LoraError, named + ".*another model"),
        "NaN": (nan, LoraError, named + ".*NaN"),
        "missing down": ({n: t for n, t in good.items() if "down" not in n}, KeyError, r"img_attn\.proj\.lora_down"),
        "LoKr of another model": (lokr, LoraError, named + ".*another model"),
        "half a LoKr": ({n: t for n, t in lokr.items() if "w2" not in n}, LoraError, named + ".*lacks a factor"),
        "LoHa of another model": (loha, LoraError, named + ".*another model"),
        "DoRA magnitude": (dora, LoraError, named + ".*magnitude has shape"),
        "OFT that the host cannot apply": (oft, LoraError, named + ".*ComfyUI cannot apply it"),
        "diff of another shape": ({f"{KEY}.diff": torch.ones(64, 128)}, LoraError, named + ".*SHAPE MISMATCH"),
    }


@pytest.mark.parametrize("wrong", bad_files())
def test_a_bad_file_is_a_named_error(plain, wrong, tmp_path):
    file, kind, words = bad_files()[wrong]
    before = forward(plain)
    with pytest.raises(kind, match=words):
        forward(with_file(plain, as_file(file, tmp_path / "bad.safetensors"), 1.0))
    assert torch.equal(forward(plain), before)


def test_the_bias_of_an_unsigned_layer_can_be_added_to_and_not_replaced(plain):
    unsigned = [key for key, module in plain.packed_layers().items() if module.packed.spec.act_unsigned != (0, 0)]
    if not unsigned:
        pytest.skip("this format has no unsigned layers")
    bias = unsigned[0].removesuffix("weight") + "bias"
    zeros = torch.zeros(plain.packed_layers()[unsigned[0]].out_features)
    added, replaced, scaled = plain.clone(), plain.clone(), plain.clone()
    added.add_patches({bias: ("diff", (zeros,))})
    assert torch.equal(forward(added), forward(plain))
    replaced.add_patches({bias: ("set", (zeros,))})
    scaled.add_patches({bias: ("diff", (zeros,))}, 1.0, 0.5)
    for patched in (replaced, scaled):
        with pytest.raises(LoraError, match=r"mlp\.2: its bias can be added to"):
            forward(patched)


def test_a_missing_up_is_logged_by_name_and_the_rest_applied(plain, caplog):
    made = tensors_of("lora", torch.ones(128, 128), 0)
    other = KEY.replace("blocks.0", "blocks.1")
    file = {f"{KEY}.{name}": t for name, t in made.items()}
    file[f"{other}.lora_down.weight"] = made["lora_down.weight"]
    patched = with_file(plain, file, 1.0)
    assert f"lora key not loaded: {other}.lora_down.weight" in caplog.text
    assert len(patched.layer_loras()) == 1


def test_the_same_file_twice_counts_twice(plain, weights):
    file = lora_of(("lora",), weights)
    once = forward(with_file(plain, file, 0.7))
    twice = with_file(with_file(plain, file, 0.4), file, 0.3)
    assert relative(forward(twice), once) < 1e-5
    rows = describe_loras(twice)["rows"]
    assert [row["applied"] for row in rows] == 2 * [len(weights)], "also of what has run"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": torch.tensor(3e38)}, "alpha over its rank is"),
        ({"lora_up.weight": torch.full((128, 4), 1e30)}, "holds 1e[+]30"),
        ({"lora_up.weight": torch.zeros(128, 0), "lora_down.weight": torch.zeros(0, 128)}, "rank 0"),
        ({"dora_scale": torch.tensor(1.0)}, "DoRA magnitude is one number"),
    ],
    ids=["alpha", "factor", "rank", "magnitude"],
)
def test_numbers_that_no_lora_has_are_refused_by_layer(plain, tmp_path, change, said):
    """The first two gave pictures of NaN, the others errors of Python without a layer."""
    made = tensors_of("lora", torch.ones(128, 128), 0) | change
    file = as_file({f"{KEY}.{name}": tensor for name, tensor in made.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(LoraError, match=rf"double_blocks\.0\..*{said}"):
        with_file(plain, file, 1.0).layer_loras()
