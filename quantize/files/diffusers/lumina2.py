"""Lumina 2 in Diffusers' names, Lumina2Transformer2DModel."""

from . import NameTable, rules

BLOCK = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "attention_norm2": "norm2",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}
MODULATED = {**BLOCK, "attention_norm1": "norm1.norm", "adaLN_modulation.1": "norm1.linear"}
OUTSIDE = {
    "x_embedder": "x_embedder",
    "cap_embedder.#": "time_caption_embed.caption_embedder.#",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}

TABLE = NameTable(
    "Lumina 2",
    (
        "time_caption_embed.timestep_embedder.linear_1.weight",
        "layers.#.norm1.linear.weight",
        "layers.#.feed_forward.linear_1.weight",
    ),
    (
        *rules("layers.#.", "layers.#.", MODULATED),
        *rules("noise_refiner.#.", "noise_refiner.#.", MODULATED),
        *rules("context_refiner.#.", "context_refiner.#.", {**BLOCK, "attention_norm1": "norm1"}),
        *rules("", "", OUTSIDE),
    ),
)
