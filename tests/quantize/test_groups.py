"""Layers that read one input: one smoothing, one low-rank branch, one file field; and what becomes of older files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.kernels.layer import LayerSpec
from svdquant_pack.quantize.calibration.file import Statistics
from svdquant_pack.quantize.calibration.tokens import ModelCall
from svdquant_pack.quantize.files.checkpoint import CheckpointError
from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.dialects import native
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.maker.group import LayerGroup, make_group, quantize_layer
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.maths.layer import Dense, Making
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.kernels.layers import random_layer
from svdquant_pack.tests.quantize.stored_models import save_model, stored_model

ATTENTION = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
TEXT = [f"transformer_blocks.0.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
RANK = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Qwen-Image of one block in 16 bit."""
    folder, generator = tmp_path_factory.mktemp("source"), torch.Generator().manual_seed(0)
    infos = open_checkpoint(save_model(folder / "x.safetensors", stored_model("qwen_image"))).weight_infos()
    tensors = {
        key: (torch.randn(info.shape, generator=generator) / info.shape[-1] ** 0.5).bfloat16()
        for key, info in infos.items()
    }
    save_file(tensors, folder / "16bit.safetensors")
    return folder / "16bit.safetensors"


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def made(request, source):
    """(16-bit file, folder) with shared.safetensors and own.safetensors in it"""
    for branches in ("shared", "own"):
        recipe = Recipe(format=request.param, rank=RANK, branches=branches, alternations=2)
        quantize_model(FileSource(source), source.with_name(f"{branches}.safetensors"), recipe)
    return source, source.parent


def same_parts(checkpoint, group, part) -> bool:
    parts = [checkpoint.layer(layer)[part] for layer in group]
    return all(torch.equal(part, parts[0]) for part in parts)


def test_a_group_is_its_layers_quantized_as_one(made):
    source, folder = made
    checkpoint, dense = open_checkpoint(folder / "shared.safetensors"), load_file(source)
    assert set(checkpoint.provenance.groups) == {tuple(ATTENTION), tuple(TEXT)}
    spec = checkpoint.specs[ATTENTION[0]]
    whole = Dense(torch.cat([dense[f"{layer}.weight"] for layer in ATTENTION]), None, replace(spec, n=3 * spec.n))
    wanted = quantize_layer(whole, Making(Recipe(format=spec.format, rank=RANK, alternations=2), torch.bfloat16))
    found = torch.cat([checkpoint.layer(layer).dense_weight() for layer in ATTENTION])
    assert torch.equal(found, wanted.layer.dense_weight())
    assert all(same_parts(checkpoint, ATTENTION, part) for part in ("smooth_factor", "proj_down"))


def test_each_may_have_its_own_branch(made):
    checkpoint = open_checkpoint(made[1] / "own.safetensors")
    assert set(checkpoint.provenance.groups) == {tuple(ATTENTION), tuple(TEXT)}
    assert same_parts(checkpoint, ATTENTION, "smooth_factor") and not same_parts(checkpoint, ATTENTION, "proj_down")


def test_a_shared_branch_is_nunchaku_s_as_it_is(made, tmp_path):
    report = convert_file(made[1] / "shared.safetensors", tmp_path / "n.safetensors", "nunchaku")
    assert not [note for note in report.notes if "branch" in note or "rounded" in note]
    written, before = load_file(tmp_path / "n.safetensors"), open_checkpoint(made[1] / "shared.safetensors")
    assert {tensor.shape[1] for key, tensor in written.items() if key.endswith("proj_down")} == {RANK}
    after = open_checkpoint(tmp_path / "n.safetensors")
    assert set(after.provenance.groups) == set(before.provenance.groups)
    for layer in (*ATTENTION, *TEXT):
        assert torch.equal(after.layer(layer).dense_weight(), before.layer(layer).dense_weight())


def test_own_branches_stand_side_by_side_for_nunchaku_and_that_is_said(made, tmp_path):
    """Exact, at the rank of all three, which its class then has for every layer."""
    report = convert_file(made[1] / "own.safetensors", tmp_path / "n.safetensors", "nunchaku")
    assert [note for note in report.notes if f"all layers are stored at rank {3 * RANK}" in note]
    written = load_file(tmp_path / "n.safetensors")
    assert {tensor.shape[1] for key, tensor in written.items() if key.endswith("proj_down")} == {3 * RANK}
    before, after = (open_checkpoint(path) for path in (made[1] / "own.safetensors", tmp_path / "n.safetensors"))
    assert json.loads(after.metadata["quantization_config"])["rank"] == 3 * RANK
    for layer, spec in before.specs.items():
        if spec.fmt.low_rank:
            assert torch.equal(after.layer(layer).dense_weight(), before.layer(layer).dense_weight())


def test_different_ranks_are_padded_to_one_for_nunchaku(tmp_path):
    """Its class has one rank for all layers; columns of zeros change nothing."""
    source = save_model(tmp_path / "a.safetensors", stored_model("qwen_image", rank=16))
    convert_file(source, tmp_path / "b.safetensors", "native")
    tensors, name = load_file(tmp_path / "b.safetensors"), "transformer_blocks.0.attn.to_out.0"
    wide = random_layer("int4", 128, 128, 48, dtype=torch.bfloat16)
    tensors |= native.encode_layer(name, wide)
    save_model(tmp_path / "c.safetensors", tensors)
    convert_file(tmp_path / "c.safetensors", tmp_path / "d.safetensors", "nunchaku")
    written = load_file(tmp_path / "d.safetensors")
    assert {tensor.shape[1] for key, tensor in written.items() if key.endswith("proj_down")} == {48}
    after, before = open_checkpoint(tmp_path / "d.safetensors"), open_checkpoint(tmp_path / "c.safetensors")
    assert json.loads(after.metadata["quantization_config"])["rank"] == 48
    for layer in before.specs:
        if before.specs[layer].fmt.low_rank:
            assert torch.equal(after.layer(layer).dense_weight(), before.layer(layer).dense_weight())


def tokens_of(folder, layer: str, k: int):
    made, generator = Statistics.create(folder / "s.safetensors", {layer: k}, 1024, {"shared": {}}), torch.Generator()
    generator.manual_seed(2)
    for step in range(8):
        made.entries[layer].observe(torch.randn(1, 128, k, generator=generator), ModelCall(step, 8), generator)
    return made.entries[layer]


def test_with_data_a_group_is_fitted_as_one_and_measured_layer_by_layer(tmp_path):
    generator, spec = torch.Generator().manual_seed(3), LayerSpec("int4", 64, 128, RANK)
    specs = [spec, replace(spec, n=128)]
    layers = [Dense(torch.randn(one.n, 128, generator=generator) / 11, torch.zeros(one.n), one) for one in specs]
    inputs = tokens_of(tmp_path, "blocks.0.q", 128)
    recipe = Recipe.named("balanced", rank=RANK, adam_steps=4, rounds=1, start_rounds=1)
    apart, together = (
        make_group(LayerGroup(layers, inputs, shared=shared), Making(recipe, torch.bfloat16))
        for shared in (False, True)
    )
    assert torch.equal(together[0].layer["proj_down"], together[1].layer["proj_down"])
    assert not torch.equal(apart[0].layer["proj_down"], apart[1].layer["proj_down"])
    for one, other, dense in zip(together, apart, layers, strict=True):
        assert one.layer.spec == dense.spec and one.record["shape"] == [dense.spec.n, 128]
        # random weights have no direction in common, which is the most that sharing can cost
        assert one.record["output_error"] < 1.3 * other.record["output_error"]
        assert one.record["weight_error"] > 0 and torch.equal(one.layer["act_mean"], other.layer["act_mean"])
    # above its limit a group stays in 16 bit as a whole
    errors = [one.record["output_error"] for one in together]
    limit = sum(errors) / 2
    kept = make_group(LayerGroup(layers, inputs, shared=True), Making(replace(recipe, fallback=limit), torch.bfloat16))
    assert min(errors) < limit < max(errors) and all(one.layer is None for one in kept)


def test_auto_rank_gives_a_group_one_rank(source, tmp_path):
    recipe = Recipe(rank=RANK, auto_rank=True, branches="shared", alternations=1)
    quantize_model(FileSource(source), tmp_path / "x.safetensors", recipe)
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    for group in (ATTENTION, TEXT):
        assert len({checkpoint.specs[layer].rank for layer in group}) == 1
    assert len({spec.rank for spec in checkpoint.specs.values() if spec.fmt.low_rank}) > 1
    assert set(checkpoint.provenance.groups) == {tuple(ATTENTION), tuple(TEXT)}


@pytest.mark.parametrize("groups", [[["transformer_blocks.0.attn.to_q", "nothing"]], [5], ["x"], [[5]]], ids=str)
def test_groups_that_the_tensors_contradict_are_refused(made, tmp_path, groups):
    from safetensors import safe_open

    path = made[1] / "shared.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if key != "svdquant_checksums"}
    metadata["svdquant"] = json.dumps({**json.loads(metadata["svdquant"]), "groups": groups})
    save_file(load_file(path), tmp_path / "x.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"x.safetensors: .*(read one input|lists of layer names)"):
        open_checkpoint(tmp_path / "x.safetensors")
