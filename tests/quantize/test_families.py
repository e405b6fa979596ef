"""The tables of the families against recorded layer names of ComfyUI's own classes (golden_keys), without ComfyUI."""

import ast
import json
import logging
from pathlib import Path

import pytest
import torch

from svdquant_pack.kernels.formats import GELU_SHIFT
from svdquant_pack.quantize.families import FAMILIES, REFUSED, Family, FamilyError, detect, pattern
from svdquant_pack.quantize.files.tensor_file import TensorInfo
from svdquant_pack.quantize.maker.model import plan_layers
from svdquant_pack.quantize.recipe import Recipe

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "quantize" / "families"
GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "golden_keys").glob("*.json"))}
FAMILY_OF = {"wan_t2v": "wan", "wan_i2v": "wan", "wan_vace": "wan"}
TABLES = [family for family in FAMILIES.values() if family.markers]


def expand(names: dict) -> dict[str, tuple[int, ...]]:
    """Recorded names with `#` -> {name: shape}."""
    found = {}
    for name, shapes in names.items():
        for shape, places in shapes:
            for place in places:
                numbers = iter(place.split("."))
                key = ".".join(next(numbers) if part == "#" else part for part in name.split("."))
                found[key] = tuple(shape)
    return found


def linears(model: str) -> dict[str, tuple[int, ...]]:
    return {name.removesuffix(".weight"): shape for name, shape in expand(GOLDEN[model]["linear"]).items()}


def keys(model: str) -> dict[str, tuple[int, ...]]:
    return expand(GOLDEN[model]["linear"]) | expand(GOLDEN[model]["other"])


def infos(model: str) -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape, torch.bfloat16) for name, shape in keys(model).items()}


def family_of(model: str) -> Family:
    return FAMILIES[FAMILY_OF.get(model, model)]


def models_of(family: Family) -> list[str]:
    return [model for model in GOLDEN if family_of(model) is family]


@pytest.mark.parametrize("model", GOLDEN)
def test_detection_finds_the_one_family(model):
    assert detect(keys(model)) is family_of(model)
    assert [family.name for family in TABLES if family.detect(keys(model))] == [family_of(model).name]


@pytest.mark.parametrize("family", TABLES, ids=lambda family: family.name)
def test_every_line_of_a_table_names_layers_of_comfyui(family):
    layers = {layer for model in models_of(family) for layer in linears(model)}
    assert layers, "no recorded names"
    optional = {  # parts of variants that the zoo does not hold
        "chroma": ("nerf_blocks.#.param_generator",),
        "hidream": ("{double,single}_stream_blocks.#.block.ff_i.{w1,w2,w3}",),
    }
    for entry in (*family.w4a4, *family.w4a16, *family.keep16):
        if entry not in optional.get(family.name, ()):
            assert any(pattern(entry).fullmatch(layer) for layer in layers), entry
    for entry in family.unsigned:
        assert any(pattern(entry).fullmatch(layer) for layer in layers), entry


# numbered parts of small networks around the blocks: embeddings and the layers at both ends
OUTSIDE = pattern(
    "{time_embed,time_embedding,time_projection,text_embedding,label_emb,img_emb,mlp_t5,extra_embedder,"
    "t_embedder,t_block,cap_embedder,x_embedder,y_embedder,final_layer,modF}"
)


@pytest.mark.parametrize("model", GOLDEN)
def test_every_linear_inside_a_block_is_in_exactly_one_table(model):
    """A layer that stays in 16 bit does so for a stated reason, not because a table forgot it."""
    family = family_of(model)
    for layer in linears(model):
        tables = [
            table
            for table in ("w4a4", "w4a16", "keep16")
            if any(pattern(entry).fullmatch(layer) for entry in getattr(family, table))
        ]
        numbered = any(part.isdigit() for part in layer.split(".")[:-1]) or layer.split(".")[-1].isdigit()
        inside = numbered and not OUTSIDE.fullmatch(layer.split(".")[0])
        assert len(tables) == inside, (layer, tables)


@pytest.mark.parametrize("model", GOLDEN)
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_the_plan_follows_the_tables(model, format):
    family, shapes = family_of(model), linears(model)
    specs = plan_layers(infos(model), family, Recipe(format=format, rank=16)).specs
    assert set(specs) <= set(shapes)
    for layer, (n, k) in shapes.items():
        rule = family.rule(layer, n, k)
        assert (layer in specs) == (rule is not None), layer
        if rule is not None:
            assert specs[layer].format == ("awq_w4a16" if rule.kind == "w4a16" else format)
            assert specs[layer].act_unsigned == (rule.act_unsigned if format == "int4" else (0, 0))


@pytest.mark.parametrize("family", TABLES, ids=lambda family: family.name)
def test_unsigned_layers_have_a_bias_and_a_range_of_whole_groups(family):
    for model in models_of(family):
        known = keys(model)
        for layer, (n, k) in linears(model).items():
            rule = family.rule(layer, n, k)
            if rule is None or rule.act_unsigned == (0, 0):
                continue
            start, stop = rule.act_unsigned
            assert f"{layer}.bias" in known, "the shift goes into the bias"
            assert 0 <= start < stop == k and start % 64 == 0, (layer, rule)


def test_both_kinds_of_gelu_fit_the_shift():
    x = torch.linspace(-3, 0, 100_001, dtype=torch.float64)
    for approximate in ("none", "tanh"):
        assert -GELU_SHIFT < torch.nn.functional.gelu(x, approximate=approximate).min() < -0.169
    assert torch.nn.functional.silu(x).min() < -GELU_SHIFT


@pytest.mark.parametrize("family", TABLES, ids=lambda family: family.name)
def test_shared_inputs_have_one_width_and_lie_in_one_block(family):
    for model in models_of(family):
        shapes = linears(model)
        groups = family.shared_groups(shapes)
        members = [layer for group in groups for layer in group]
        assert len(members) == len(set(members)), "a layer has one input"
        for group in groups:
            rules = {family.rule(layer, *shapes[layer]) for layer in group}
            assert len(rules) == 1 and None not in rules, "all of a group are quantized alike"
            assert len({shapes[layer][1] for layer in group}) == 1
            assert len({layer.rsplit(".", 2)[0] for layer in group}) == 1, "one attention or MLP"
    used = {entry for entries in family.shared_input for entry in entries}
    if family.name != "hidream":  # its first table is for variants without experts
        layers = {layer for model in models_of(family) for layer in linears(model)}
        assert all(any(pattern(entry).fullmatch(layer) for layer in layers) for entry in used)


def test_groups_come_in_the_order_of_the_table():
    layers = ["transformer_blocks.1.attn.to_v", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_q"]
    layers += ["transformer_blocks.1.attn.to_q", "transformer_blocks.2.attn.to_q", "proj_out"]
    assert FAMILIES["qwen_image"].shared_groups(layers) == [
        ("transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_v"),
        ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"),
    ]


@pytest.mark.parametrize("name", ["flux", "flux2", "chroma", "hunyuan_video"])
def test_norms_have_the_name_that_every_comfyui_reads(name):
    """Newer ComfyUIs call them `weight` and read both; what older ones have is in golden_keys."""
    family, known = FAMILIES[name], list(keys(name))
    newer = [f"{key.removesuffix('.scale')}.weight" if key.endswith(".scale") else key for key in known]
    assert newer != known and list(map(family.canonical, newer)) == known
    assert list(map(family.canonical, known)) == known


def test_names_of_the_first_hunyuan_video_release_are_known():
    family = FAMILIES["hunyuan_video"]
    old = "double_blocks.0.img_attn_qkv.weight", "double_blocks.0.img_mod.linear.bias", "single_blocks.1.linear1.weight"
    new = "double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mod.lin.bias", "single_blocks.1.linear1.weight"
    assert tuple(map(family.canonical, old)) == new
    known = keys("hunyuan_video")
    assert all(family.canonical(key) == key for key in known), "a name of ComfyUI's stays"
    renamed = [key.replace("_attn.qkv.", "_attn_qkv.").replace("_mod.lin.", "_mod.linear.") for key in known]
    assert detect(renamed) is family


SANA = {
    "original": ("blocks.0.mlp.inverted_conv.conv.weight", "blocks.0.mlp.point_conv.conv.weight"),
    "diffusers": ("transformer_blocks.0.ff.conv_inverted.weight", "transformer_blocks.0.ff.conv_point.weight"),
    "nunchaku": ("transformer_blocks.0.ff.inverted_conv.qweight", "transformer_blocks.0.ff.point_conv.qweight"),
}


@pytest.mark.parametrize("spelling", SANA)
def test_sana_is_refused_with_the_reason(spelling):
    others = ("t_block.1.weight", "blocks.0.attn.qkv.weight", "blocks.0.cross_attn.kv_linear.weight")
    with pytest.raises(FamilyError, match=r"SANA.*ComfyUI has no SANA model"):
        detect((*others, *SANA[spelling]))


def test_two_families_at_once_are_an_error():
    with pytest.raises(FamilyError, match="several families: flux, qwen_image"):
        detect([*keys("flux"), *keys("qwen_image")])


def test_an_unknown_model_gets_the_generic_rule_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="svdquant"):
        assert detect(["encoder.layers.0.attention.wq.weight"]).name == "generic"
    assert "generic rule" in caplog.text


@pytest.mark.parametrize("model", GOLDEN)
def test_the_generic_rule_does_most_of_what_a_table_does(model):
    """Nothing that a table marks as modulation, and at least four in five of its 4-bit weights."""
    family, generic, shapes = family_of(model), FAMILIES["generic"], linears(model)
    large = {layer: shape for layer, shape in shapes.items() if min(shape) >= 128}
    wanted = {layer for layer, shape in large.items() if getattr(family.rule(layer, *shape), "kind", "") == "w4a4"}
    modulation = {layer for layer, shape in large.items() if getattr(family.rule(layer, *shape), "kind", "") == "w4a16"}
    chosen = {layer for layer, shape in large.items() if generic.rule(layer, *shape)}
    assert not chosen & modulation
    assert len(chosen & wanted) > 0.8 * len(wanted)
    assert all(generic.rule(layer, *shape).act_unsigned == (0, 0) for layer, shape in large.items() if layer in chosen)


def test_patterns():
    assert pattern("a.#.{b,c}_d").fullmatch("a.12.c_d").groups() == ("12", "c")
    assert not pattern("a.#.{b,c}_d").fullmatch("a.x.c_d")
    assert pattern("a.*.b").fullmatch("a.x_1.b") and not pattern("a.*.b").fullmatch("a.x.y.b")
    assert not pattern("a.b").fullmatch("axb")


@pytest.mark.parametrize("path", sorted(SOURCES.glob("*.py")), ids=lambda path: path.stem)
def test_a_family_is_a_table(path):
    """It imports nothing but its base, has a title, and its name is that of its file."""
    if path.stem == "__init__":
        return
    modules = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    imports = [
        name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for name in node.names
    ]
    assert set(modules) <= {None, "dataclasses"} and {alias.name for alias in imports} <= {"re"}
    family = (FAMILIES | REFUSED)[path.stem]
    assert family.title and family.models
