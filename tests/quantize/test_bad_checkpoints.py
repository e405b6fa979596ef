"""Files that cannot be used are refused with file, layer, what was found and what was needed."""

import json

import pytest
import torch

from svdquant_pack.quantize.files.checkpoint import CheckpointError
from svdquant_pack.quantize.files.dialects import native
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.tests.kernels.layers import random_layer
from svdquant_pack.tests.quantize.stored_models import awq, quantization_config, save_model, stored_model, w4a4


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
    "a leftover key": (lambda s: s | {"transformer_blocks.0.extra.weight": torch.ones(2)}, "no place in flux.*extra"),
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
    "a missing branch": (
        edited(**{f"{SINGLE}.mlp_fc1.lora_up": None, f"{SINGLE}.mlp_fc1.lora_down": None}),
        "mlp_fc1' has no low-rank branch",
    ),
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


def test_a_layer_that_lacks_its_scale_is_refused(tmp_path):
    stored = stored_model("flux", "nvfp4")
    del stored["transformer_blocks.0.out_proj.wtscale"]
    with pytest.raises(CheckpointError, match=r"out_proj' has no scale per tensor"):
        open_checkpoint(save_model(tmp_path / "x.safetensors", stored))


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


@pytest.mark.parametrize("place", [0, -1])
def test_a_zero_that_activations_are_divided_by_is_named(tmp_path, place):
    tensors = native.encode_layer("b.0", random_layer("int4", 128, 128, 16, dtype=torch.bfloat16))
    tensors["b.0.bias"] = torch.zeros(128)
    tensors["b.0.smooth_factor"][place] = 0
    checkpoint = open_checkpoint(save_model(tmp_path / "x.safetensors", tensors))
    with pytest.raises(CheckpointError, match=r"^x.safetensors: layer 'b.0': smooth_factor holds a zero"):
        checkpoint.layer("b.0")
