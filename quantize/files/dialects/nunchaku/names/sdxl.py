"""SDXL and SDXL-Turbo: Diffusers' UNet, ComfyUI's blocks. Convolutions, norms and resnets stay in 16 bit.

Block numbers follow from two resnets on the way down and three on the way up. GEGLU is (value, gate) in both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..tables import Block, Infos, LinearRow, NameMap, StoredName, count_blocks, same

LEVELS = range(4)
HEAD = 64  # channels of an attention head
TIMES = 256  # numbers that stand for each of an image's sizes

TRANSFORMER = (
    LinearRow(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        (StoredName("attn1.to_qkv"),),
        lite=(StoredName("attn1.to_q"), StoredName("attn1.to_k"), StoredName("attn1.to_v")),
        bias=False,
    ),
    same("attn1.to_out.0", "attn1.to_out.0"),
    same("attn2.to_q", "attn2.to_q").but(bias=False),
    same("attn2.to_k", "attn2.to_k").but(bias=False),
    same("attn2.to_v", "attn2.to_v").but(bias=False),
    same("attn2.to_out.0", "attn2.to_out.0"),
    same("ff.net.0.proj", "ff.net.0.proj"),
    same("ff.net.2", "ff.net.2"),
    *(same(name, name) for name in ("norm1", "norm2", "norm3")),
)
AROUND = tuple(same(name, name) for name in ("norm", "proj_in", "proj_out"))
RESNET = (
    same("in_layers.0", "norm1"),
    same("in_layers.2", "conv1"),
    same("emb_layers.1", "time_emb_proj"),
    same("out_layers.0", "norm2"),
    same("out_layers.3", "conv2"),
    same("skip_connection", "conv_shortcut").but(optional=True),
)


def attention(stored: str, host: str) -> tuple[Block, ...]:
    return (
        Block(f"{stored}.transformer_blocks.#", f"{host}.transformer_blocks.#", TRANSFORMER, optional=True),
        Block(stored, host, AROUND, optional=True),
    )


def blocks() -> tuple[Block, ...]:
    found = [*attention("mid_block.attentions.0", "middle_block.1")]
    found += [Block(f"mid_block.resnets.{i}", f"middle_block.{2 * i}", RESNET) for i in range(2)]
    for level in LEVELS:
        for i in range(2):
            stored, host = f"down_blocks.{level}", f"input_blocks.{1 + 3 * level + i}"
            found += attention(f"{stored}.attentions.{i}", f"{host}.1")
            found.append(Block(f"{stored}.resnets.{i}", f"{host}.0", RESNET, optional=True))
        for i in range(3):
            stored, host = f"up_blocks.{level}", f"output_blocks.{3 * level + i}"
            found += attention(f"{stored}.attentions.{i}", f"{host}.1")
            found.append(Block(f"{stored}.resnets.{i}", f"{host}.0", RESNET, optional=True))
        down, up = (same("op", "conv"),), (same("conv", "conv"),)
        host = f"input_blocks.{3 + 3 * level}.0"
        found.append(Block(f"down_blocks.{level}.downsamplers.0", host, down, optional=True))
        host = f"output_blocks.{3 * level + 2}.2"
        found.append(Block(f"up_blocks.{level}.upsamplers.0", host, up, optional=True))
    return tuple(found)


OUTSIDE = Block(
    "",
    "",
    (
        same("input_blocks.0.0", "conv_in"),
        same("out.0", "conv_norm_out"),
        same("out.2", "conv_out"),
        same("time_embed.0", "time_embedding.linear_1"),
        same("time_embed.2", "time_embedding.linear_2"),
        same("label_emb.0.0", "add_embedding.linear_1"),
        same("label_emb.0.2", "add_embedding.linear_2"),
    ),
)


def config(infos: Infos, known: Mapping[str, Any]) -> dict[str, Any]:
    """Diffusers' UNet2DConditionModel"""
    levels = [level for level in LEVELS if f"input_blocks.{1 + 3 * level}.0.in_layers.2.weight" in infos]
    channels = [infos[f"input_blocks.{1 + 3 * level}.0.out_layers.3.weight"].shape[0] for level in levels]
    down = [[_depth(infos, f"input_blocks.{1 + 3 * level + i}.1") for i in range(2)] for level in levels]
    up = [[_depth(infos, f"output_blocks.{3 * level + i}.1") for i in range(3)] for level in levels]
    middle = _depth(infos, "middle_block.1")
    text = [info.shape[1] for name, info in infos.items() if name.endswith(".attn2.to_k.weight")]
    return {
        "sample_size": 128,
        "in_channels": infos["input_blocks.0.0.weight"].shape[1],
        "out_channels": infos["out.2.weight"].shape[0],
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": [f"{'CrossAttn' * any(depths)}DownBlock2D" for depths in down],
        "mid_block_type": f"UNetMidBlock2D{'CrossAttn' * bool(middle)}",
        "up_block_types": [f"{'CrossAttn' * any(depths)}UpBlock2D" for depths in up],
        **_layers(down, up, middle),
        "attention_head_dim": [width // HEAD for width in channels],  # heads: Diffusers' name for it is an old mistake
        "cross_attention_dim": text[0],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIMES,
        "projection_class_embeddings_input_dim": infos["label_emb.0.0.weight"].shape[1],
    }


def _depth(infos: Infos, place: str) -> int:
    return count_blocks(infos, f"{place}.transformer_blocks")


def _layers(down: Sequence[Sequence[int]], up: Sequence[Sequence[int]], middle: int) -> dict[str, Any]:
    """One number per level where both ways have it throughout, else a list per level and one for the way up"""
    ways = zip(down, reversed(up), strict=True)
    even = all(len({*one, *other}) == 1 for one, other in ways) and middle in (0, down[-1][0])
    if even:
        return {"transformer_layers_per_block": [max(1, depths[0]) for depths in down]}
    # the middle reads the first number of the last level
    return {
        "transformer_layers_per_block": [[max(1, depth) for depth in depths] for depths in down],
        "reverse_transformer_layers_per_block": [[max(1, depth) for depth in depths] for depths in up],
    }


NAMES = NameMap(
    "sdxl",
    (
        (
            "down_blocks.#.attentions.#.transformer_blocks.#.attn1.to_qkv.qweight",
            "down_blocks.#.attentions.#.transformer_blocks.#.attn1.to_q.qweight",
        ),
    ),
    (*blocks(), OUTSIDE),
    class_name="UNet2DConditionModel",
    model_class="NunchakuSDXLUNet2DConditionModel",
    row_scales=True,
    config=config,
)
