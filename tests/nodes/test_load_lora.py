"""Spellings of LoRAs that the host does not know, through the pack's loader: the LoRA that the host knows."""

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.lora
import comfy.sd

from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.nodes.load_lora import SVDQuantLoadLora, with_host_names
from svdquant_pack.quantize.lora.names import renamed
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.sampling import LORAS, forward

DIFFUSERS = LORAS / "svdquant_demo_inverted_diffusers.safetensors"


@pytest.fixture(scope="module")
def four_bit(checkpoints):
    return load_model(str(checkpoints["int4"]), compute="w16")


def spelled(kind: str) -> dict[str, torch.Tensor]:
    """The demo's LoRA, whose keys are transformer.X.lora_A.weight, as other programs write it."""
    lora = {key.removeprefix("transformer."): tensor for key, tensor in load_file(DIFFUSERS).items()}
    if kind == "old":  # of Diffusers
        ends = (("lora_A.weight", "lora.down.weight"), ("lora_B.weight", "lora.up.weight"))
        for new, old in ends:
            lora = {key.replace(new, old): tensor for key, tensor in lora.items()}
        return {f"unet.{key}": tensor for key, tensor in lora.items()}
    if kind == "adapter":
        return {f"transformer.{key.replace('.weight', '.style.weight')}": tensor for key, tensor in lora.items()}
    return {f"{kind}{key}": tensor for key, tensor in lora.items()}


@pytest.mark.parametrize("kind", ["base_model.model.", "pipe.dit.", "base_model.model.transformer.", "old", "adapter"])
def test_every_spelling_is_the_lora_that_the_host_knows(four_bit, kind):
    expected = comfy.sd.load_lora_for_models(four_bit, None, load_file(DIFFUSERS), 0.8, 0)[0]
    lora = with_host_names(spelled(kind), four_bit)
    found = comfy.sd.load_lora_for_models(four_bit, None, lora, 0.8, 0)[0]
    assert found.patches.keys() == expected.patches.keys()
    assert [len(patches) for patches in found.patches.values()] == [len(each) for each in expected.patches.values()]
    assert torch.equal(forward(found), forward(expected))
    assert not torch.equal(forward(found), forward(four_bit))


def test_what_the_host_knows_is_left_alone(four_bit):
    lora = load_file(DIFFUSERS)
    assert with_host_names(lora, four_bit).keys() == lora.keys()


def xlabs() -> dict[str, torch.Tensor]:
    generator, width, rank, lora = torch.Generator().manual_seed(0), 128, 4, {}
    for block, layer, out in (
        *(
            (f"double_blocks.{i}", f"{part}_lora{side}", n)
            for i in (0, 1)
            for part, n in (("qkv", 384), ("proj", 128))
            for side in (1, 2)
        ),
        *((f"single_blocks.{i}", "qkv_lora", 384) for i in (0, 1)),
    ):
        lora[f"{block}.processor.{layer}.down.weight"] = torch.randn(rank, width, generator=generator)
        lora[f"{block}.processor.{layer}.up.weight"] = 0.02 * torch.randn(out, rank, generator=generator)
    return lora


def test_xlabs_names_are_the_layers_of_their_blocks(four_bit):
    lora = xlabs()
    by_hand = {}
    for key, tensor in lora.items():
        for old, new in (
            ("processor.qkv_lora1", "img_attn.qkv"),
            ("processor.qkv_lora2", "txt_attn.qkv"),
            ("processor.proj_lora1", "img_attn.proj"),
            ("processor.proj_lora2", "txt_attn.proj"),
            ("processor.qkv_lora", "linear1_qkv"),
        ):
            key = key.replace(f"{old}.", f"{new}.lora_")
        by_hand[f"diffusion_model.{key}"] = tensor
    assert with_host_names(lora, four_bit).keys() == by_hand.keys()
    one, other = (
        comfy.sd.load_lora_for_models(four_bit, None, each, 1.0, 0)[0]
        for each in (by_hand, with_host_names(lora, four_bit))
    )
    assert len(other.patches) == 10 and torch.equal(forward(one), forward(other))


@pytest.mark.parametrize("name", ["z_image", "sdxl", "qwen_image"])
def test_names_of_other_models_find_their_layers(name, tmp_path):
    known = comfy.lora.model_lora_keys_unet(
        load_pinned_model(str(zoo.save(name, tmp_path / "x.safetensors"))).model, {}
    )
    wanted = {
        "z_image": ("transformer.layers.0.attention.to_q", "diffusion_model.layers.0.attention.to_q"),
        "qwen_image": ("pipe.dit.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
        "sdxl": (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        ),
    }[name]
    end = "_lora.down.weight" if name == "sdxl" else ".lora_A.weight"
    found = renamed([wanted[0] + end], known)
    if wanted[0] in known:  # a host that knows it itself
        assert found == {}
    else:
        assert known[found[wanted[0] + end].removesuffix(end)] == known[wanted[1]]


def test_the_node_loads_names_and_leaves_a_text_encoders_file_alone(four_bit, tmp_path, monkeypatch, caplog):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    save_file({key: tensor.contiguous() for key, tensor in spelled("pipe.dit.").items()}, tmp_path / "a.safetensors")
    te = {
        f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{side}.weight": torch.ones(2, 2) for side in ("up", "down")
    }
    save_file(te, tmp_path / "te.safetensors")
    node = SVDQuantLoadLora()
    model, clip = node.load(four_bit, "a.safetensors", 0.8)
    expected = comfy.sd.load_lora_for_models(four_bit, None, load_file(DIFFUSERS), 0.8, 0)[0]
    assert clip is None and torch.equal(forward(model), forward(expected))
    with caplog.at_level("WARNING", logger="svdquant"):
        after, _ = node.load(model, "te.safetensors", 1.0)
    assert "changes nothing in the diffusion model" in caplog.text
    assert torch.equal(forward(after), forward(model))
    assert node.load(four_bit, "a.safetensors", 0.0)[0] is four_bit


def test_old_diffusers_keys_of_an_adapter_keep_what_is_not_theirs():
    known = {"diffusion_model.blocks.0.q"}
    keys = ["pipe.dit.blocks.0.q.lora_A.weight", "diffusion_model.blocks.0.q.lora_A.weight", "x.y", "blocks.9.q.alpha"]
    assert renamed(keys, known) == {}, "the place of the first is taken"
    assert renamed(["base_model.model.blocks.0.q.alpha"], known) == {
        "base_model.model.blocks.0.q.alpha": "diffusion_model.blocks.0.q.alpha"
    }
