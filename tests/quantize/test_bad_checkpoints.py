"""Files that cannot be used are refused with file, layer, what was found and what was needed."""

import json
from dataclasses import replace

import pytest
import torch

from svdquant_pack.kernels.layer import LayerError, LayerSpec
from svdquant_pack.quantize.files import tiles
from svdquant_pack.quantize.files.checkpoint import CheckpointError
from svdquant_pack.quantize.files.describe import describe
from svdquant_pack.quantize.files.dialects import native
from svdquant_pack.quantize.files.dialects.nunchaku.layers import inspect_layer, read_layer, write_layer
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.tensor_file import TensorInfo
from svdquant_pack.tests.kernels.layers import random_layer
from svdquant_pack.tests.quantize.stored_models import awq, quantization_config, save_model, stored_model, w4a4
from svdquant_pack.tests.quantize.test_layout import same_bytes


def edited(**changes):
    """Change tensors of a FLUX model: name -> tensor, None (drop) or a function of the old one."""

    def edit(stored):
        for name, change in changes.items():
            name = name.replace("__", ".")
            if change is None:
                del stored[name]
            else:
                stored[name] = change(stored[name]) if callable(change) else change
        return stored

    return edit


SINGLE = "single_transformer_blocks.0"
BAD = {  # what is wrong -> (how, what the message must say)
    "a leftover layer": (
        lambda s: s | {f"transformer_blocks.0.extra.{k}": v for k, v in _v1(w4a4(128, 128, torch.Generator())).items()},
        "no place in flux.*extra",
    ),
    "leftover integers": (lambda s: s | {"extra": torch.ones(2, dtype=torch.int32)}, "'extra' has no place"),
    "a missing layer": (
        lambda s: {key: tensor for key, tensor in s.items() if ".0.out_proj_context." not in key},
        "out_proj_context' is missing",
    ),
    "a missing norm": (edited(**{f"{SINGLE}.norm_q.weight": None}), "norm_q.weight' is missing"),
    "a missing block": (
        lambda s: {key.replace("transformer_blocks.0", "transformer_blocks.1"): tensor for key, tensor in s.items()},
        "transformer_blocks.0' is missing",
    ),
    "a missing part": (edited(**{f"{SINGLE}.mlp_fc1.smooth": None}), "mlp_fc1.*smooth.* is missing"),
    "a missing bias": (edited(**{f"{SINGLE}.mlp_fc1.bias": None}), "bias is missing"),
    "half a branch": (edited(**{f"{SINGLE}.mlp_fc1.lora_up": None}), "mlp_fc1': proj_up is missing"),
    "a layer of another size": (
        lambda s: s | {f"{SINGLE}.out_proj.{k}": v for k, v in _v1(w4a4(256, 128, torch.Generator())).items()},
        r"out_proj': is stored as \(N, K\) = \(256, 128\), the model needs \(128, 128\)",
    ),
    "a 16-bit tensor of another size": (
        edited(**{"context_embedder.weight": torch.ones(64, 128)}),
        r"context_embedder.weight has shape \(64, 128\), the model needs \(128, any\)",
    ),
    "a 4-bit and a 16-bit part": (
        lambda s: (
            {k: v for k, v in s.items() if not k.startswith(f"{SINGLE}.mlp_fc2")}
            | {f"{SINGLE}.mlp_fc2.weight": torch.ones(128, 256), f"{SINGLE}.mlp_fc2.bias": torch.ones(128)}
        ),
        "4-bit in one part and 16-bit in another",
    ),
    "different smoothing": (edited(**{f"{SINGLE}.mlp_fc1.smooth": lambda t: t * 2}), "another smooth_factor"),
    "NaN in scales": (
        edited(**{f"{SINGLE}.mlp_fc1.wscales": lambda t: t * torch.nan}),
        "linear1': wscales holds NaN",
    ),
    "Inf in a bias": (edited(**{f"{SINGLE}.mlp_fc1.bias": lambda t: t + torch.inf}), "bias holds NaN or Inf"),
    "a foreign suffix": (lambda s: s | {f"{SINGLE}.mlp_fc1.scaled_zeros": torch.ones(2)}, "text encoder"),
    "two spellings of a part": (
        lambda s: s | {f"{SINGLE}.mlp_fc1.smooth_factor": s[f"{SINGLE}.mlp_fc1.smooth"]},
        "in two spellings",
    ),
    "two dialects": (
        lambda s: (
            {k: v for k, v in s.items() if not k.startswith("transformer_blocks.0.qkv_proj.")}
            | {f"transformer_blocks.0.attn.to_{x}.{k}": v for x in "qkv" for k, v in _v1(_shared()).items()}
        ),
        "mixes dialects",
    ),
    "two 16-bit dtypes": (
        lambda s: {
            k: v.half() if f"{SINGLE}.out_proj." in k and v.dtype == torch.bfloat16 else v for k, v in s.items()
        },
        "float16 and",
    ),
    "int16 codes": (edited(**{f"{SINGLE}.mlp_fc1.qweight": lambda t: t.to(torch.int16)}), "TinyChat"),
}


def _v1(layer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        "proj_down": "lora_down",
        "proj_up": "lora_up",
        "smooth_factor": "smooth",
        "smooth_factor_orig": "smooth_orig",
    }
    return {names.get(part, part): tensor for part, tensor in layer.items()}


def _shared() -> dict[str, torch.Tensor]:
    return w4a4(128, 128, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_gets_a_name(tmp_path, case):
    edit, message = BAD[case]
    path = save_model(tmp_path / "broken.safetensors", edit(stored_model("flux")))
    with pytest.raises(CheckpointError, match=f"(?s)broken.safetensors.*{message}"):
        checkpoint = open_checkpoint(path)
        for name in checkpoint.specs:
            checkpoint.layer(name)
        for name in checkpoint.rest:
            checkpoint.tensor(name)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (quantization_config("nvfp4"), "the header says fp4_e2m1_all, its tensors are int4"),
        (quantization_config(rank=128), "the header says rank 128, the tensors have 16"),
        ({"quantization_config": "{"}, "is not JSON"),
        ({"svdquant": json.dumps({"shapes": {"transformer_blocks.0.mlp_fc1": [100, 128]}})}, "mlp_fc1"),
    ],
)
def test_a_header_that_lies(tmp_path, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(save_model(tmp_path / "x.safetensors", stored_model("flux"), metadata))


def test_the_writers_default_rank_is_no_lie(tmp_path):
    """Nunchaku's merge tool writes 32 where it finds no `lora_down`, as in files of the second generation."""
    path = save_model(tmp_path / "x.safetensors", stored_model("qwen_image", rank=48), quantization_config(rank=32))
    assert open_checkpoint(path).specs["transformer_blocks.0.attn.to_out.0"].rank == 48


def test_other_models_are_refused_by_name(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sana = {f"transformer_blocks.0.ff.inverted_conv.{k}": v for k, v in _v1(w4a4(256, 128, generator)).items()}
    with pytest.raises(CheckpointError, match=r"SANA.*no model class"):
        open_checkpoint(save_model(tmp_path / "x.safetensors", sana))
    t5 = {"encoder.block.0.layer.0.SelfAttention.q.qweight": torch.zeros(32, 128, dtype=torch.int16)}
    t5 |= {"encoder.block.0.layer.0.SelfAttention.q.scales": torch.ones(2, 128)}
    with pytest.raises(CheckpointError, match="text encoder"):
        open_checkpoint(save_model(tmp_path / "x.safetensors", t5))
    unknown = {f"blocks.0.proj.{k}": v for k, v in _v1(w4a4(128, 128, generator)).items()}
    with pytest.raises(CheckpointError, match=r"no known family.*blocks\.0\.proj.*--as-is"):
        open_checkpoint(save_model(tmp_path / "x.safetensors", unknown))
    both = stored_model("flux") | {f"layers.0.attention.to_qkv.{k}": v for k, v in awq(128, 128, generator).items()}
    with pytest.raises(CheckpointError, match="several families: flux, z_image"):
        open_checkpoint(save_model(tmp_path / "x.safetensors", both))
    mixed = stored_model("flux") | native.encode_layer("x", random_layer("int4", 128, 128, 16, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="mixes several dialects"):
        open_checkpoint(save_model(tmp_path / "x.safetensors", mixed))


def test_nvfp4_scales_that_end_early_are_refused(tmp_path):
    layer = w4a4(128, 256, torch.Generator().manual_seed(0), "nvfp4")
    layer["wscales"] = layer["wscales"][:-4]
    path = save_model(tmp_path / "x.safetensors", {f"x.{k}": v for k, v in _v1(layer).items()})
    with pytest.raises(CheckpointError, match="covers 192 of 256 input channels"):
        open_checkpoint(path, as_is=True)


def test_what_nunchaku_reads_as_nothing_is_read_so_with_a_note(tmp_path):
    """Its loaders make up an empty branch and a scale of 1, and leave out what their model does not have."""
    stored = stored_model("flux", "nvfp4")
    whole = open_checkpoint(save_model(tmp_path / "whole.safetensors", stored))
    assert whole.notes == ()
    scale = stored.pop("transformer_blocks.0.out_proj.wtscale")
    for part in ("lora_up", "lora_down"):
        del stored[f"transformer_blocks.0.mlp_fc1.{part}"]
    stored["transformer_blocks.0.extra.weight"] = torch.ones(2, dtype=torch.bfloat16)
    found = open_checkpoint(save_model(tmp_path / "x.safetensors", stored))
    branch, scales, extra = found.notes
    assert "'transformer_blocks.0.mlp_fc1', have no low-rank branch" in branch
    assert "'transformer_blocks.0.out_proj', have no scale per tensor or channel: it counts as 1" in scales
    assert extra.endswith("transformer_blocks.0.extra.weight") and set(found.rest) == set(whole.rest)
    assert found.specs["double_blocks.0.img_mlp.0"].rank == 0
    with_scale, without = (each.layer("double_blocks.0.img_attn.proj") for each in (whole, found))
    assert torch.allclose(with_scale.decode_weight(), without.decode_weight() * scale.float(), rtol=1e-6)
    assert describe(found)["notes"] == list(found.notes)


INTEGERS = {"b.0.bias": torch.ones(128, dtype=torch.int16), "head.weight": torch.ones(4, 4, dtype=torch.int8)}


@pytest.mark.parametrize("name", INTEGERS)
def test_a_tensor_of_integers_is_no_weight(tmp_path, name):
    """A bias of int16 was loaded, with the wrong numbers."""
    tensors = native.encode_layer("b.0", random_layer("int4", 128, 128, 16, dtype=torch.bfloat16))
    path = save_model(tmp_path / "x.safetensors", tensors | {name: INTEGERS[name]})
    with pytest.raises(CheckpointError, match=rf"^x.safetensors: .*{name} has dtype int"):
        open_checkpoint(path)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_nan_outside_the_4bit_layers_is_named(tmp_path, bad):
    tensors = native.encode_layer("b.0", random_layer("int4", 128, 128, 16, dtype=torch.bfloat16))
    tensors |= {"b.0.bias": torch.zeros(128), "head.weight": torch.zeros(4, 4), "position_ids": torch.arange(3)}
    for name in ("b.0.bias", "head.weight"):
        damaged = tensors[name].clone()
        damaged.view(-1)[-1] = bad
        checkpoint = open_checkpoint(save_model(tmp_path / "x.safetensors", tensors | {name: damaged}))
        assert checkpoint.tensor("position_ids").tolist() == [0, 1, 2]
        with pytest.raises(CheckpointError, match=rf"^x.safetensors: {name} holds NaN or Inf"):
            checkpoint.tensor(name)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("transformer_blocks.0.qkv_proj_context.lora_down", lambda t: t[:0], "proj_down has shape .0, 16. and proj_up"),
        ("single_transformer_blocks.0.mlp_fc2.bias", None, "bias is missing"),
    ],
)
def test_what_silently_counted_as_nothing_is_refused(tmp_path, name, change, said):
    """An empty proj_down beside a proj_up, and the bias of a layer that is stored in two."""
    tensors = stored_model("flux", "nvfp4")
    lost = tensors.pop(name)
    tensors |= {} if change is None else {name: change(lost)}
    path = save_model(tmp_path / "x.safetensors", tensors, quantization_config("nvfp4"))
    with pytest.raises(CheckpointError, match=rf"^x.safetensors: layer .*: {said}"):
        open_checkpoint(path)


@pytest.mark.parametrize("place", [0, -1])
def test_a_zero_that_activations_are_divided_by_is_named(tmp_path, place):
    tensors = native.encode_layer("b.0", random_layer("int4", 128, 128, 16, dtype=torch.bfloat16))
    tensors["b.0.bias"] = torch.zeros(128)
    tensors["b.0.smooth_factor"][place] = 0
    checkpoint = open_checkpoint(save_model(tmp_path / "x.safetensors", tensors))
    with pytest.raises(CheckpointError, match=r"^x.safetensors: layer 'b.0': smooth_factor holds a zero"):
        checkpoint.layer("b.0")


SEED = torch.Generator().manual_seed(0)
STORED = {  # kind of stored layer -> its tensors under our names
    "int4": w4a4(256, 128, SEED),
    "nvfp4": w4a4(256, 256, SEED, "nvfp4"),
    "nvfp4 merged": w4a4(384, 128, SEED, "nvfp4"),
    "awq": awq(24, 1088, SEED),
}
HALF = torch.float16
DAMAGES = [  # (kind, what is changed: name -> (shape, dtype) or None, what the message must say)
    ("int4", {"qweight": None}, "qweight is missing"),
    ("int4", {"qweight": ((256, 64), torch.int16)}, "TinyChat"),
    ("int4", {"qweight": ((256, 64), torch.int32)}, "qweight has dtype int32, needed int8"),
    ("awq", {"qweight": ((6, 544), torch.int8)}, "qweight has dtype int8, needed int32"),
    ("int4", {"qweight": ((256 * 64,), torch.int8)}, "needed two dimensions"),
    ("int4", {"qweight": ((256, 0), torch.int8)}, "not empty"),
    ("int4", {"qweight": ((192, 64), torch.int8)}, r"is stored as \(192, 128\), needed multiples of 128"),
    ("int4", {"qweight": ((256, 32), torch.int8)}, r"is stored as \(256, 64\), needed multiples of 128"),
    ("int4", {"wscales": None}, "wscales is missing"),
    ("int4", {"wscales": ((2, 256), torch.int8)}, r"wscales has dtype int8, needed .*\(int4\)"),
    ("int4", {"wscales": ((4, 256), HALF)}, r"wscales has shape \(4, 256\), int4 at \(256, 128\) needs \(2, 256\)"),
    ("nvfp4", {"wscales": ((12, 256), torch.float8_e4m3fn)}, "covers 192 of 256 input channels.*loses the rest"),
    ("nvfp4", {"wscales": ((8, 256), torch.float8_e4m3fn)}, r"wscales has shape .* needs \(16, 256\)"),
    ("int4", {"smooth_factor": None}, "smooth .*is missing"),
    ("int4", {"smooth_factor": ((256,), HALF)}, r"smooth_factor has shape \(256,\).*needs \(128,\)"),
    ("int4", {"proj_down": None}, "proj_down is missing"),
    ("int4", {"proj_up": None}, "proj_up is missing"),
    ("int4", {"proj_down": ((128, 24), HALF)}, "R a multiple of 16"),
    ("int4", {"proj_down": ((16,), HALF)}, "R a multiple of 16"),
    ("int4", {"proj_down": ((64, 16), HALF)}, r"proj_down has shape \(64, 16\).*needs \(128, 16\)"),
    ("int4", {"proj_up": ((256, 32), HALF)}, r"proj_up has shape \(256, 32\).*needs \(256, 16\)"),
    ("int4", {"bias": ((128,), HALF)}, r"bias has shape \(128,\).*needs \(256,\)"),
    ("int4", {"smooth_factor": ((128,), torch.int8)}, "smooth_factor has dtype int8, needed bfloat16 or float16"),
    ("nvfp4", {"wtscale": ((1,), torch.int8)}, "wtscale has dtype int8, needed bfloat16 or float16"),
    ("awq", {"wzeros": ((32, 24), torch.int8)}, "wzeros has dtype int8, needed bfloat16 or float16"),
    ("int4", {"bias": ((256,), torch.int8)}, "bias has dtype int8, needed bfloat16 or float16"),
    ("int4", {"bias": ((256,), HALF)}, "mixes bfloat16 and float16"),
    ("int4", {"wtscale": ((1,), HALF)}, "wtscale is not a tensor of a int4 layer"),
    ("nvfp4", {"wtscale": ((2,), torch.bfloat16)}, r"wtscale has shape \(2,\).*needs \(1,\)"),
    ("nvfp4 merged", {"wcscales": ((128,), torch.bfloat16)}, r"wcscales has shape \(128,\).*needs \(384,\)"),
    ("awq", {"qweight": ((6, 40), torch.int32)}, "needed N a multiple of 4 and K of 64"),
    ("awq", {"wscales": ((18, 24), torch.bfloat16)}, r"wscales has shape \(18, 24\).*needs \(32, 24\)"),
    ("awq", {"wzeros": ((16, 24), torch.bfloat16)}, r"wzeros has shape \(16, 24\).*needs \(32, 24\)"),
    ("awq", {"bias": ((48,), torch.bfloat16)}, r"bias has shape \(48,\)"),
    ("awq", {"smooth_factor": ((1088,), torch.bfloat16)}, "smooth_factor is not a tensor of a awq_w4a16 layer"),
]


def infos_of(kind: str, **changed) -> dict[str, TensorInfo]:
    infos = {name: TensorInfo.of(tensor) for name, tensor in STORED[kind].items()}
    infos |= {name: TensorInfo(*new) for name, new in changed.items() if new is not None}
    return {name: info for name, info in infos.items() if changed.get(name, info) is not None}


@pytest.mark.parametrize(("kind", "changed", "words"), DAMAGES)
def test_a_stored_layer_that_does_not_fit_itself_is_named(kind, changed, words):
    with pytest.raises(LayerError, match=words):
        inspect_layer("x", infos_of(kind, **changed))


@pytest.mark.parametrize(
    ("kind", "n", "k", "words"),
    [
        ("int4", 300, 128, r"is stored as \(N, K\) = \(256, 128\), the model needs \(300, 128\)"),
        ("int4", 256, 200, r"the model needs \(256, 200\)"),
        ("int4", 128, 128, r"the model needs \(128, 128\)"),
        ("int4", 250, 100, "K=100 is not a multiple of the int4 group of 64"),
        ("awq", 28, 1088, r"the model needs \(28, 1088\)"),
    ],
)
def test_a_stored_layer_of_another_size_than_the_models_is_named(kind, n, k, words):
    with pytest.raises(LayerError, match=words):
        inspect_layer("x", infos_of(kind), n, k)


@pytest.mark.parametrize(
    ("kind", "changed", "wanted"),
    [
        ("int4", {}, LayerSpec("int4", 256, 128, 16)),
        ("int4", {"smooth_factor_orig": ((5,), torch.int8)}, LayerSpec("int4", 256, 128, 16)),  # never read
        ("int4", {"proj_down": ((128, 0), HALF), "proj_up": ((256, 0), HALF)}, LayerSpec("int4", 256, 128, 0)),
        ("nvfp4", {"wtscale": ((), torch.float32)}, LayerSpec("nvfp4", 256, 256, 16)),
        ("nvfp4 merged", {}, LayerSpec("nvfp4", 384, 128, 16)),
        ("awq", {}, LayerSpec("awq_w4a16", 24, 1088)),
        ("awq", dict.fromkeys(("wscales", "wzeros"), ((17, 24), torch.bfloat16)), LayerSpec("awq_w4a16", 24, 1088)),
    ],
)
def test_what_a_stored_layer_may_look_like(kind, changed, wanted):
    assert inspect_layer("x", infos_of(kind, **changed)).spec == wanted
    smaller = (wanted.n - 6, wanted.k - wanted.fmt.group_size)
    if kind != "awq":
        assert inspect_layer("x", infos_of(kind, **changed), *smaller).spec == replace(
            wanted, n=smaller[0], k=smaller[1]
        )


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
@pytest.mark.parametrize("left", ["a row of codes", "a column of codes", "scales of a row", "scales of a group", ""])
def test_weights_where_padding_has_to_be_are_named(kind, left):
    """One number in a corner is enough; and what is written where nothing was left over is read again."""
    fmt, n, k = kind, 200, 192
    layer = random_layer(fmt, n, k, 16, dtype=torch.bfloat16)
    stored = write_layer(layer.tensors, layer.spec)
    unpack, pack = (
        (tiles.unpack_int4_scales, tiles.pack_int4_scales)
        if kind == "int4"
        else (tiles.unpack_nvfp4_scales, tiles.pack_nvfp4_scales)
    )
    codes, scales = tiles.unpack_qweight(stored["qweight"]), unpack(stored["wscales"]).float()
    if left.endswith("codes"):
        codes[(n, 0) if "row" in left else (0, k // 2)] = 1
    elif left:
        scales[(0, n) if "row" in left else (k // layer.spec.fmt.group_size, 0)] = 2
    stored |= {"qweight": tiles.pack_qweight(codes), "wscales": pack(scales.to(stored["wscales"].dtype))}
    found = inspect_layer("x", {name: TensorInfo.of(tensor) for name, tensor in stored.items()}, n, k)
    if left:
        with pytest.raises(LayerError, match=r"is stored as \(256, 256\); beyond \(200, 192\) there are weights"):
            read_layer(found, stored.__getitem__)
    else:
        again = read_layer(found, stored.__getitem__)
        assert all(same_bytes(tensor, again[name].view(tensor.shape)) for name, tensor in layer.tensors.items())
