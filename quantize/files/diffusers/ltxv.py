"""LTX-Video in Diffusers' names, LTXVideoTransformer3DModel: ComfyUI's but for few."""

from . import NameTable, rules

SAME = ("to_q", "to_k", "to_v", "to_out.0")
ATTENTION = {**{name: name for name in SAME}, "q_norm": "norm_q", "k_norm": "norm_k"}
BLOCK = {
    **{f"{kind}.{name}": f"{kind}.{stored}" for kind in ("attn1", "attn2") for name, stored in ATTENTION.items()},
    **{name: name for name in ("ff.net.0.proj", "ff.net.2", "scale_shift_table")},
}
OUTSIDE = {
    "patchify_proj": "proj_in",
    "adaln_single.emb.timestep_embedder.linear_1": "time_embed.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2": "time_embed.emb.timestep_embedder.linear_2",
    "adaln_single.linear": "time_embed.linear",
    **{name: name for name in ("caption_projection.linear_1", "caption_projection.linear_2")},
    **{name: name for name in ("proj_out", "scale_shift_table")},
}

TABLE = NameTable(
    "LTX-Video",
    (
        "proj_in.weight",
        "time_embed.emb.timestep_embedder.linear_1.weight",
        "caption_projection.linear_1.weight",
        "transformer_blocks.#.attn1.norm_q.weight",
    ),
    (*rules("transformer_blocks.#.", "transformer_blocks.#.", BLOCK), *rules("", "", OUTSIDE)),
)
