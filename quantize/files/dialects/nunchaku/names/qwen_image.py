"""Qwen-Image, Qwen-Image-Edit, -2509, -2511 and their lightning merges: Diffusers' and ComfyUI's names are the same.

Nunchaku merges q, k, v of both streams; ComfyUI has them apart.
"""

from collections.abc import Mapping
from typing import Any

from ..tables import Block, Infos, LinearRow, NameMap, StoredName, count_blocks, same
from .flux import rotary_axes


def merged(q: str, k: str, v: str, stored: str) -> LinearRow:
    names = tuple(f"attn.{name}" for name in (q, k, v))
    lite = tuple(StoredName(name, "h", "h") for name in names)
    return LinearRow(names, (StoredName(f"attn.{stored}", "3h", "h"),), lite=lite)


def stream(name: str) -> tuple[LinearRow, ...]:
    return (
        same(f"{name}_mod.1", f"{name}_mod.1", "6h", "h").but(chunks=6),
        same(f"{name}_mlp.net.0.proj", f"{name}_mlp.net.0.proj", "mlp", "h"),
        same(f"{name}_mlp.net.2", f"{name}_mlp.net.2", "h", "mlp").but(unsigned=True),
    )


BLOCK = Block(
    "transformer_blocks.#",
    "transformer_blocks.#",
    (
        *stream("img"),
        *stream("txt"),
        merged("to_q", "to_k", "to_v", "to_qkv"),
        merged("add_q_proj", "add_k_proj", "add_v_proj", "add_qkv_proj"),
        same("attn.to_out.0", "attn.to_out.0", "h", "h"),
        same("attn.to_add_out", "attn.to_add_out", "h", "h"),
    ),
    {f"attn.{name}.weight": (f"attn.{name}.weight",) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")},
)

OUTSIDE = Block(
    "",
    "",
    (
        same("img_in", "img_in", "h"),
        same("txt_in", "txt_in", "h"),
        same("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_1", "h"),
        same("time_text_embed.timestep_embedder.linear_2", "time_text_embed.timestep_embedder.linear_2", "h", "h"),
        same("norm_out.linear", "norm_out.linear", "2h", "h"),
        same("proj_out", "proj_out", None, "h"),
    ),
    {"txt_norm.weight": ("txt_norm.weight",)},
    {name: (name,) for name in ("__index_timestep_zero__", "time_text_embed.addition_t_embedding.weight")},
)


def config(infos: Infos, known: Mapping[str, Any]) -> dict[str, Any]:
    """Diffusers' QwenImageTransformer2DModel; what only newer releases of it know is stated where it is not off"""
    hidden, channels = infos["img_in.weight"].shape
    head = infos["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    later = {
        "zero_cond_t": "__index_timestep_zero__" in infos,
        "use_additional_t_cond": "time_text_embed.addition_t_embedding.weight" in infos,
    }
    return {
        "patch_size": 2,
        "in_channels": channels,
        "out_channels": infos["proj_out.weight"].shape[0] // 4,
        "num_layers": count_blocks(infos, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": infos["txt_in.weight"].shape[1],
        "guidance_embeds": False,
        "axes_dims_rope": list(known.get("axes_dims_rope") or rotary_axes(head, 16)),
        **{key: True for key, on in later.items() if on},
    }


NAMES = NameMap(
    "qwen_image",
    (("transformer_blocks.#.img_mlp.net.0.proj.qweight",),),
    (OUTSIDE, BLOCK),
    v2=True,
    class_name="QwenImageTransformer2DModel",
    model_class="NunchakuQwenImageTransformer2DModel",
    config=config,
)
