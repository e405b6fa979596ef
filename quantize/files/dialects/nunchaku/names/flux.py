"""FLUX.1: dev, schnell, fill, depth, canny, kontext, krea and their finetunes.

ComfyUI keeps the joined linears of a single block: linear1 = [q, k, v, mlp in], linear2 = [attention out, mlp out].
Nunchaku stores the two parts of each; the whole bias of linear2 sits in `mlp_fc2`. Rows of q and k are in the order
of ComfyUI. `norm_out.linear` is (scale, shift) here and (shift, scale) there.
"""

from collections.abc import Mapping
from typing import Any

from ..tables import Block, Infos, LinearRow, NameMap, StoredName, count_blocks, same

PATCH = 2  # pixels of a latent to a side of a token: ComfyUI counts channels before, Diffusers after they are joined


def qkv(*names: str) -> tuple[StoredName, ...]:
    return tuple(StoredName(name, "h", "h") for name in names)


def stream(host: str, norm: str, suffix: str, attention: tuple[str, ...], feed_forward: str) -> tuple[LinearRow, ...]:
    """The linears of the image or the text stream of a double block.

    attention  Diffusers' names: q, k, v, out, merged q k v
    """
    q, k, v, out, merged = (f"attn.{name}" for name in attention)
    return (
        same(f"{host}_mod.lin", f"{norm}.linear", "6h", "h").but(chunks=6),
        LinearRow(
            (f"{host}_attn.qkv",),
            (StoredName(f"qkv_proj{suffix}", "3h", "h"),),
            also=((StoredName(merged, "3h", "h"),),),
            lite=qkv(q, k, v),
        ),
        same(f"{host}_attn.proj", f"out_proj{suffix}", "h", "h", also=(out,), lite=out),
        same(
            f"{host}_mlp.0",
            f"mlp{suffix}_fc1",
            "mlp",
            "h",
            also=(f"{feed_forward}.net.0.proj",),
            lite=f"{feed_forward}.net.0.proj",
        ),
        same(
            f"{host}_mlp.2",
            f"mlp{suffix}_fc2",
            "h",
            "mlp",
            also=(f"{feed_forward}.net.2",),
            lite=f"{feed_forward}.net.2",
        ).but(unsigned=True),
    )


DOUBLE = Block(
    "transformer_blocks.#",
    "double_blocks.#",
    stream("img", "norm1", "", ("to_q", "to_k", "to_v", "to_out.0", "to_qkv"), "ff")
    + stream(
        "txt",
        "norm1_context",
        "_context",
        ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "add_qkv_proj"),
        "ff_context",
    ),
    {
        "img_attn.norm.query_norm.scale": ("norm_q.weight", "attn.norm_q.weight"),
        "img_attn.norm.key_norm.scale": ("norm_k.weight", "attn.norm_k.weight"),
        "txt_attn.norm.query_norm.scale": ("norm_added_q.weight", "attn.norm_added_q.weight"),
        "txt_attn.norm.key_norm.scale": ("norm_added_k.weight", "attn.norm_added_k.weight"),
    },
)

SINGLE = Block(
    "single_transformer_blocks.#",
    "single_blocks.#",
    (
        same("modulation.lin", "norm.linear", "3h", "h").but(chunks=3),
        LinearRow(
            ("linear1",),
            (StoredName("qkv_proj", "3h", "h"), StoredName("mlp_fc1", "mlp", "h")),
            also=((StoredName("attn.to_qkv", "3h", "h"), StoredName("mlp_fc1", "mlp", "h")),),
            lite=(*qkv("attn.to_q", "attn.to_k", "attn.to_v"), StoredName("proj_mlp", "mlp", "h")),
        ),
        LinearRow(
            ("linear2",),
            (StoredName("out_proj", "h", "h"), StoredName("mlp_fc2", "h", "mlp", unsigned=True)),
            also=((StoredName("attn.to_out", "h", "h"), StoredName("mlp_fc2", "h", "mlp", unsigned=True)),),
            lite=(StoredName("proj_out", "h"),),
            join="columns",
        ),
    ),
    {
        "norm.query_norm.scale": ("norm_q.weight", "attn.norm_q.weight"),
        "norm.key_norm.scale": ("norm_k.weight", "attn.norm_k.weight"),
    },
)


def embedder(host: str, stored: str, optional: bool = False) -> Block:
    linears = (same("in_layer", "linear_1", "h"), same("out_layer", "linear_2", "h", "h"))
    return Block(f"time_text_embed.{stored}", host, linears, optional=optional)


EMBEDDERS = (
    embedder("time_in", "timestep_embedder"),
    embedder("guidance_in", "guidance_embedder", optional=True),  # schnell has none
    embedder("vector_in", "text_embedder"),
)

OUTSIDE = Block(
    "",
    "",
    (
        same("img_in", "x_embedder", "h"),
        same("txt_in", "context_embedder", "h"),
        same("final_layer.adaLN_modulation.1", "norm_out.linear", "2h", "h").but(swap=True),
        same("final_layer.linear", "proj_out", None, "h"),
    ),
)


def rotary_axes(head: int, first: int) -> list[int]:
    """How the channels of a head divide among the three axes where no file says so: a fixed first part, equal rests"""
    return [first, (head - first) // 2, (head - first) // 2]


def sizes(infos: Infos, known: Mapping[str, Any]) -> dict[str, Any]:
    """What both configurations are made of"""
    hidden, head = infos["img_in.weight"].shape[0], infos["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    return {
        "hidden": hidden,
        "head": head,
        "heads": hidden // head,
        "mlp": infos["double_blocks.0.img_mlp.0.weight"].shape[0],
        "depth": count_blocks(infos, "double_blocks"),
        "single": count_blocks(infos, "single_blocks"),
        "in": infos["img_in.weight"].shape[1],
        "out": infos["final_layer.linear.weight"].shape[0],
        "text": infos["txt_in.weight"].shape[1],
        "vector": infos["vector_in.in_layer.weight"].shape[1],
        "guidance": "guidance_in.in_layer.weight" in infos,
        "axes": list(known.get("axes_dim") or rotary_axes(head, 16)),
    }


def config(infos: Infos, known: Mapping[str, Any]) -> dict[str, Any]:
    """Diffusers' FluxTransformer2DModel"""
    found = sizes(infos, known)
    return {
        "patch_size": 1,
        "in_channels": found["in"],
        "out_channels": found["out"],
        "num_layers": found["depth"],
        "num_single_layers": found["single"],
        "attention_head_dim": found["head"],
        "num_attention_heads": found["heads"],
        "joint_attention_dim": found["text"],
        "pooled_projection_dim": found["vector"],
        "guidance_embeds": found["guidance"],
        "axes_dims_rope": found["axes"],
    }


def comfy(infos: Infos, known: Mapping[str, Any]) -> dict[str, Any]:
    """ComfyUI's Flux, as the class without guidance where there is none"""
    found = sizes(infos, known)
    model = {
        "image_model": "flux",
        "in_channels": found["in"] // PATCH**2,
        "out_channels": found["out"] // PATCH**2,
        "patch_size": PATCH,
        "vec_in_dim": found["vector"],
        "context_in_dim": found["text"],
        "hidden_size": found["hidden"],
        "mlp_ratio": found["mlp"] / found["hidden"],
        "num_heads": found["heads"],
        "depth": found["depth"],
        "depth_single_blocks": found["single"],
        "axes_dim": found["axes"],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": found["guidance"],
        "disable_unet_model_creation": True,
    }
    return {"model_class": "Flux" if found["guidance"] else "FluxSchnell", "model_config": model}


NAMES = NameMap(
    "flux",
    (
        ("single_transformer_blocks.#.mlp_fc1.qweight", "single_transformer_blocks.#.proj_mlp.qweight"),
        ("transformer_blocks.#.norm1.linear.qweight", "transformer_blocks.#.norm1.linear.weight"),
    ),
    (OUTSIDE, *EMBEDDERS, DOUBLE, SINGLE),
    class_name="FluxTransformer2DModel",
    model_class="NunchakuFluxTransformer2dModel",
    config=config,
    comfy=comfy,
)
