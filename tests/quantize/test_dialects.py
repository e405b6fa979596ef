"""Every dialect: what is read is what was stored, joined and split as ComfyUI's model has it; misfits get a name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from svdquant_pack.kernels.layer import Layer
from svdquant_pack.quantize.files import spelling, tiles
from svdquant_pack.quantize.files.checkpoint import Checkpoint, CheckpointError, Provenance
from svdquant_pack.quantize.files.dialects import DIALECTS, kitchen, native, nunchaku
from svdquant_pack.quantize.files.dialects.nunchaku.layers import inspect_layer, read_layer, write_layer
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.tensor_file import TensorInfo, TensorWriter
from svdquant_pack.tests.kernels.layers import random_layer
from svdquant_pack.tests.quantize.stored_models import (
    QUANTIZED,
    save_model,
    stored_model,
    w4a4,
)
from svdquant_pack.tests.quantize.test_layout import same_bytes

PRECISIONS = ("int4", "nvfp4")


def save_as(checkpoint: Checkpoint, path, dialect: str, **options) -> list[str]:
    with TensorWriter(path, {}, extra=10_000) as writer:
        module = {"nunchaku": nunchaku, "kitchen": kitchen, "native": native}[dialect]
        return module.save(checkpoint, writer, False, lambda layer: None, **options)


def dense(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A linear as one matrix, 4-bit or not."""
    if name in checkpoint.specs:
        return checkpoint.layer(name).dense_weight()
    return checkpoint.tensor(f"{name}.weight").float()


@pytest.mark.parametrize("lite", [False, True], ids=["nunchaku", "lite"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", QUANTIZED)
def test_a_whole_model_is_read_and_written_back_as_the_same_bytes(tmp_path, family, precision, lite):
    stored = stored_model(family, precision, lite=lite, blocks=2)
    checkpoint = open_checkpoint(save_model(tmp_path / "in.safetensors", stored))
    assert checkpoint.provenance.family == family
    assert checkpoint.dialect == ("nunchaku lite" if lite else "nunchaku")
    for name in checkpoint.specs:
        checkpoint.layer(name)
    for name, info in checkpoint.rest.items():
        assert TensorInfo.of(checkpoint.tensor(name)) == info
    assert save_as(checkpoint, tmp_path / "out.safetensors", "nunchaku", lite=lite) == []
    written = load_file(tmp_path / "out.safetensors")
    assert {key for key in written if not key.endswith("_orig")} == {key for key in stored if not key.endswith("_orig")}
    for key, tensor in stored.items():
        assert same_bytes(written[key], tensor), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_both_16_bit_dtypes(tmp_path, dtype):
    path = save_model(tmp_path / "x.safetensors", stored_model("qwen_image", dtype=dtype))
    checkpoint = open_checkpoint(path)
    layer = checkpoint.layer("transformer_blocks.0.attn.to_q")
    assert checkpoint.dtype == layer["wscales"].dtype == layer["proj_up"].dtype == dtype


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixes_are_no_part_of_names(tmp_path, prefix):
    stored = stored_model("z_image")
    plain = open_checkpoint(save_model(tmp_path / "a.safetensors", stored))
    prefixed = {f"{prefix}{name}": tensor for name, tensor in stored.items()}
    assert open_checkpoint(save_model(tmp_path / "b.safetensors", prefixed)).specs == plain.specs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_flux_single_blocks_are_joined(tmp_path, precision):
    path = save_model(tmp_path / "x.safetensors", stored_model("flux", precision))
    model, stored = open_checkpoint(path), open_checkpoint(path, as_is=True)
    block, h, mlp = "single_transformer_blocks.0", 128, 256
    spec1, spec2 = model.specs["single_blocks.0.linear1"], model.specs["single_blocks.0.linear2"]
    assert (spec1.n, spec1.k, spec1.rank, spec1.act_unsigned) == (3 * h + mlp, h, 32, (0, 0))
    unsigned = (h, h + mlp) if precision == "int4" else (0, 0)
    assert (spec2.n, spec2.k, spec2.rank, spec2.act_unsigned) == (h, h + mlp, 32, unsigned)
    for host, parts, dim in (("linear1", ("qkv_proj", "mlp_fc1"), 0), ("linear2", ("out_proj", "mlp_fc2"), 1)):
        wanted = torch.cat([dense(stored, f"{block}.{part}") for part in parts], dim)
        assert torch.allclose(dense(model, f"single_blocks.0.{host}"), wanted, rtol=1e-6, atol=1e-7)
    swapped = stored.tensor("norm_out.linear.weight").chunk(2)
    assert torch.equal(model.tensor("final_layer.adaLN_modulation.1.weight"), torch.cat(swapped[::-1]))


def test_qwen_and_z_image_parts_are_rows_of_what_is_stored(tmp_path):
    for family, stored_name, hosts in (
        ("qwen_image", "transformer_blocks.0.attn.to_qkv", [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]),
        ("z_image", "layers.0.feed_forward.net.0.proj", [f"layers.0.feed_forward.{x}" for x in ("w3", "w1")]),
    ):
        for precision in PRECISIONS:
            path = save_model(tmp_path / "x.safetensors", stored_model(family, precision))
            model, stored = open_checkpoint(path), open_checkpoint(path, as_is=True)
            assert torch.equal(torch.cat([dense(model, host) for host in hosts]), dense(stored, stored_name))
            assert len({model.specs[host].rank for host in hosts}) == 1


def test_unsigned_layers_by_family_precision_and_dialect(tmp_path):
    def unsigned(family, **options):
        checkpoint = open_checkpoint(save_model(tmp_path / "x.safetensors", stored_model(family, **options)))
        return {name for name, spec in checkpoint.specs.items() if spec.act_unsigned != (0, 0)}

    double, qwen = "double_blocks.0", "transformer_blocks.0"
    flux = {f"{double}.img_mlp.2", f"{double}.txt_mlp.2", "single_blocks.0.linear2"}
    assert unsigned("flux") == flux and unsigned("flux", precision="nvfp4") == set()
    assert unsigned("qwen_image") == {f"{qwen}.img_mlp.net.2", f"{qwen}.txt_mlp.net.2"}
    for family in ("flux2", "z_image", "sdxl"):
        assert unsigned(family) == set()
    assert unsigned("flux", lite=True) == unsigned("qwen_image", lite=True) == set()


def test_as_is_keeps_what_the_bias_means(tmp_path):
    for lite in (False, True):
        path = save_model(tmp_path / "x.safetensors", stored_model("flux", lite=lite))
        checkpoint = open_checkpoint(path, as_is=True)
        unsigned = {name for name, spec in checkpoint.specs.items() if spec.act_unsigned != (0, 0)}
        assert len(unsigned) == (0 if lite else 3) and all(name.endswith("fc2") for name in unsigned)


def test_modulation_is_natural_and_without_the_one_except_in_lite(tmp_path):
    layer = "transformer_blocks.0.img_mod.1"
    stored = stored_model("qwen_image")
    checkpoint = open_checkpoint(save_model(tmp_path / "a.safetensors", stored))
    as_is = open_checkpoint(tmp_path / "a.safetensors", as_is=True)
    rows = dense(as_is, layer).view(128, 6, 128).transpose(0, 1).reshape(768, 128)
    assert torch.equal(dense(checkpoint, layer), rows)
    bias = stored[f"{layer}.bias"].float().view(128, 6).T.clone()
    bias[[1, 4]] -= 1
    assert torch.equal(checkpoint.tensor(f"{layer}.bias"), bias.flatten())
    x = torch.randn(3, 128)
    interleaved = x @ dense(as_is, layer).T + stored[f"{layer}.bias"].float()
    ours = x @ dense(checkpoint, layer).T + checkpoint.tensor(f"{layer}.bias")
    ours.view(3, 6, 128)[:, [1, 4]] += 1
    assert torch.allclose(interleaved.view(3, 128, 6).transpose(1, 2).reshape(3, -1), ours, atol=1e-5)
    lite = stored_model("qwen_image", lite=True)
    checkpoint = open_checkpoint(save_model(tmp_path / "b.safetensors", lite))
    assert torch.equal(checkpoint.tensor(f"{layer}.bias"), lite[f"{layer}.bias"])


def test_zeros_of_a_modulation_layer_may_have_either_sign():
    plain = random_layer("awq_w4a16", 24, 128, dtype=torch.bfloat16)
    scales = torch.full_like(plain["wscales"], 0.5)
    zeros = (torch.arange(48).view(2, 24) - 20) / 2
    stored = write_layer({**plain.tensors, "wscales": scales, "wzeros": zeros}, plain.spec)
    assert torch.equal(stored["wzeros"][:2].float(), zeros - 4)
    assert stored["wzeros"][:2].signbit().equal(zeros <= 4), "a zero is -0 * scale, as the packers write it"
    infos = {name: TensorInfo.of(tensor) for name, tensor in stored.items()}
    assert torch.equal(read_layer(inspect_layer("x", infos), stored.__getitem__)["wzeros"].float(), zeros)


def test_where_names_say_nothing_the_header_decides(tmp_path):
    """Both dialects have these names once attention is in 16 bit."""
    stored = stored_model("qwen_image", lite=True)
    for layer in [key.removesuffix(".qweight") for key in stored if ".attn." in key and key.endswith(".qweight")]:
        stored = {key: tensor for key, tensor in stored.items() if not key.startswith(f"{layer}.")}
        stored |= {f"{layer}.weight": torch.ones(128, 128).bfloat16(), f"{layer}.bias": torch.ones(128).bfloat16()}
    lite = {"quant_method": "nunchaku_lite"}
    for metadata, dialect in (
        ({}, "nunchaku"),
        ({"quantization_config": json.dumps(lite)}, "nunchaku lite"),
        ({"config": json.dumps({"quantization_config": lite})}, "nunchaku lite"),
    ):
        assert open_checkpoint(save_model(tmp_path / "x.safetensors", stored, metadata)).dialect == dialect


def test_padding_is_cropped_where_the_size_is_known(tmp_path):
    generator = torch.Generator().manual_seed(0)
    plain = random_layer("nvfp4", 200, 240, 16, dtype=torch.bfloat16)
    stored = write_layer(plain.tensors, plain.spec)
    infos = {name: TensorInfo.of(tensor) for name, tensor in stored.items()}
    assert (tiles.unpack_vector(stored["smooth_factor"])[240:] == 1).all(), "an engine divides by it"
    layer = inspect_layer("x", infos, 200, 240)
    read = read_layer(layer, stored.__getitem__)
    assert layer.spec == plain.spec and all(same_bytes(read[name], tensor) for name, tensor in plain.tensors.items())
    assert inspect_layer("x", infos).spec == replace(plain.spec, n=256, k=256)
    full = w4a4(256, 256, generator, "nvfp4")
    wrong = inspect_layer("x", {name: TensorInfo.of(tensor) for name, tensor in full.items()}, 200, 240)
    with pytest.raises(ValueError, match="there are weights, needed padding"):
        read_layer(wrong, full.__getitem__)


def test_a_padded_model_comes_back_in_its_own_size(tmp_path):
    """h = 192 is stored as 256 and known from img_in; the width of the MLP follows from its ratio or the header."""
    h, specs, tensors = 192, {}, {}
    shapes = {"img_attn.qkv": (3 * h, h), "img_attn.proj": (h, h), "img_mlp.0": (4 * h, h), "img_mlp.2": (h, 4 * h)}
    for i, (name, (n, k)) in enumerate(shapes.items()):
        for stream in ("img", "txt"):
            host = f"double_blocks.0.{name.replace('img', stream)}"
            specs[host] = random_layer("int4", n, k, 16, dtype=torch.bfloat16, seed=i)
    specs["single_blocks.0.linear1"] = random_layer("int4", 7 * h, h, 16, dtype=torch.bfloat16)
    specs["single_blocks.0.linear2"] = random_layer("int4", h, 5 * h, 16, (h, 5 * h), torch.bfloat16)
    model = open_checkpoint(save_model(tmp_path / "small.safetensors", stored_model("flux")))
    for name, spec in model.specs.items():
        if not spec.fmt.low_rank:
            specs[name] = random_layer(spec.format, spec.n // 128 * h, h, dtype=torch.bfloat16)
    for name, info in model.rest.items():
        shape = [{128: h, 256: 2 * h, 384: 3 * h, 768: 6 * h}.get(size, size) for size in info.shape]
        layer = name.rpartition(".")[0]
        tensors[name] = torch.randn([specs[layer].spec.n] if layer in specs else shape).bfloat16()
    source = Checkpoint(
        tmp_path / "native.safetensors",
        "native",
        torch.bfloat16,
        Provenance("flux"),
        {name: layer.spec for name, layer in specs.items()},
        {name: TensorInfo.of(tensor) for name, tensor in tensors.items()},
        lambda name: specs[name].tensors,
        tensors.__getitem__,
    )
    save_as(source, tmp_path / "out.safetensors", "nunchaku")
    for keep_header in (True, False):
        written = load_file(tmp_path / "out.safetensors")
        assert written["transformer_blocks.0.qkv_proj.qweight"].shape == (640, 128)
        metadata = {} if not keep_header else _metadata(tmp_path / "out.safetensors")
        back = open_checkpoint(save_model(tmp_path / "back.safetensors", written, metadata))
        for name, layer in specs.items():
            read = back.layer(name)
            assert (read.spec.n, read.spec.k) == (layer.spec.n, layer.spec.k)
            rounded = 0 if layer.spec.fmt.low_rank else 1e-2  # zeros of modulation layers have 16 bits there
            assert torch.allclose(read.dense_weight(), layer.dense_weight(), rtol=1e-6, atol=1e-7 + rounded)


def _metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_older_folder_is_the_union_of_its_files(tmp_path):
    stored, folder = stored_model("flux"), tmp_path / "svdq-int4-flux.1-dev"
    folder.mkdir()
    blocks = {key: tensor for key, tensor in stored.items() if "blocks." in key}
    save_model(folder / "transformer_blocks.safetensors", blocks)
    save_model(
        folder / "unquantized_layers.safetensors",
        {key: tensor for key, tensor in stored.items() if key not in blocks},
    )
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    (folder / "comfy_config.json").write_text(json.dumps({"model_class": "Flux", "model_config": {"depth": 1}}))
    checkpoint = open_checkpoint(folder)
    single = open_checkpoint(save_model(tmp_path / "single.safetensors", stored))
    assert checkpoint.specs == single.specs and checkpoint.rest == single.rest
    assert checkpoint.provenance.unet_config == {"depth": 1}
    for name in checkpoint.specs:
        ours, theirs = checkpoint.layer(name), single.layer(name)
        assert all(same_bytes(tensor, theirs[part]) for part, tensor in ours.tensors.items())
    with pytest.raises(CheckpointError, match="Choose one file"):
        open_checkpoint(tmp_path)


def test_a_diffusers_folder_says_lite_in_its_config(tmp_path):
    save_model(tmp_path / "diffusion_pytorch_model.safetensors", stored_model("z_image", lite=True))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "nunchaku_lite"}}))
    assert open_checkpoint(tmp_path).dialect == "nunchaku lite"


KITCHEN = {
    "plain": random_layer("int4", 128, 128, 16, dtype=torch.bfloat16),
    "gelu": random_layer("int4", 128, 192, 32, (0, 192), torch.float16),
    "awq": random_layer("awq_w4a16", 96, 128, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("tile_packed", [False, True], ids=["natural", "tile-packed"])
@pytest.mark.parametrize("second_spelling", [False, True], ids=["weight_proj_down", "proj_down"])
@pytest.mark.parametrize("case", KITCHEN)
def test_kitchen_in_all_spellings(tmp_path, case, second_spelling, tile_packed):
    layer = KITCHEN[case]
    tensors = kitchen.encode_layer("x", layer, tile_packed) | {"x.bias": torch.zeros(layer.spec.n)}
    if second_spelling:
        again = {part: spelling.SUFFIXES[part] for part in kitchen.OWN.values()}
        tensors = {
            f"x.{again[kitchen.PARTS[key[2:]]]}" if key[2:] in kitchen.OWN else key: tensor
            for key, tensor in tensors.items()
        }
    checkpoint = open_checkpoint(save_model(tmp_path / "x.safetensors", tensors))
    natural = second_spelling and not (tile_packed and case != "awq")
    assert checkpoint.dialect == ("native" if natural else "kitchen")
    read = checkpoint.layer("x")
    assert read.spec == layer.spec and read.tensors.keys() == layer.tensors.keys()
    assert all(same_bytes(tensor, layer[part]) for part, tensor in read.tensors.items())


def test_kitchen_branch_behind_the_division_is_brought_in_front(tmp_path):
    layer = KITCHEN["plain"]
    behind = (layer["proj_down"].float() * layer["smooth_factor"].float()[:, None]).bfloat16()
    for stated in ({"lowrank_branch_input_basis": "post_smoothing"}, {"proj_down_smooth_folded": False}):
        tensors = native.encode_layer("x", Layer(layer.spec, {**layer.tensors, "proj_down": behind}))
        marker = {"format": "svdquant_w4a4", "group_size": 64, **stated}
        tensors["x.comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
        checkpoint = open_checkpoint(save_model(tmp_path / "x.safetensors", tensors))
        wanted = behind.float() / layer["smooth_factor"].float()[:, None]
        assert checkpoint.dialect == "kitchen" and torch.equal(checkpoint.layer("x")["proj_down"], wanted)
    marker |= {"lowrank_branch_input_basis": "raw"}
    tensors["x.comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="contradiction"):
        open_checkpoint(save_model(tmp_path / "x.safetensors", tensors))


def test_kitchen_markers_in_the_header(tmp_path):
    layer = KITCHEN["awq"]
    tensors = kitchen.encode_layer("x", layer)
    marker = json.loads(bytes(tensors.pop("x.comfy_quant").tolist()))
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"x": marker}})}
    path = save_model(tmp_path / "x.safetensors", tensors, metadata)
    assert open_checkpoint(path).layer("x").spec == layer.spec
    with pytest.raises(CheckpointError, match="no 4-bit layers"):
        open_checkpoint(save_model(tmp_path / "y.safetensors", tensors))


def test_qwen_layers_behind_a_gelu_are_unsigned_where_the_marker_is_silent(tmp_path):
    name = "transformer_blocks.0.img_mlp.net.2"
    layer = random_layer("int4", 128, 128, 16, dtype=torch.bfloat16)
    for encode in (kitchen.encode_layer, native.encode_layer):
        for marker, unsigned in (({}, (0, 128)), ({"act_unsigned": False}, (0, 0))):
            tensors = encode(name, layer) | {f"{name}.bias": torch.zeros(128)}
            text = json.dumps({"format": "svdquant_w4a4", "group_size": 64, **marker})
            tensors[f"{name}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
            checkpoint = open_checkpoint(save_model(tmp_path / "x.safetensors", tensors))
            assert checkpoint.specs[name].act_unsigned == unsigned


def test_dialects_are_the_folder_and_each_can_be_written():
    assert set(DIALECTS) == {"core", "kitchen", "native", "nunchaku"}
    assert all(dialect.save for dialect in DIALECTS.values())
