"""Wan 2.1 and 2.2 in Diffusers' names, WanTransformer3DModel and WanVACETransformer3DModel."""

from . import NameTable, rules

ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK = {
    **{f"self_attn.{name}": f"attn1.{stored}" for name, stored in ATTENTION.items()},
    **{f"cross_attn.{name}": f"attn2.{stored}" for name, stored in ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",  # the only norm of a block that has weights
    "modulation": "scale_shift_table",
}
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}

TABLE = NameTable(
    "Wan",
    (
        "patch_embedding.weight",
        "condition_embedder.time_embedder.linear_1.weight",
        "condition_embedder.text_embedder.linear_1.weight",
        "blocks.#.attn1.to_q.weight",
        "blocks.#.ffn.net.0.proj.weight",
    ),
    (
        *rules("blocks.#.", "blocks.#.", BLOCK),
        *rules("vace_blocks.#.", "vace_blocks.#.", {**BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"}),
        *rules("", "", OUTSIDE),
    ),
)
