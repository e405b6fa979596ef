"""SD3 and SD3.5 in Diffusers' names, SD3Transformer2DModel.

The last block makes no text: its modulation has two halves, which change places as those of the last layer do.
"""

from . import NameTable, rules

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
BLOCK = {
    "x_block.attn.qkv": QKV,
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.qkv": tuple(name.replace("attn.", "attn2.") for name in QKV),
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.qkv": ADDED,
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
OUTSIDE = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}

TABLE = NameTable(
    "SD3",
    (
        "pos_embed.proj.weight",
        "context_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.#.attn.add_q_proj.weight",
    ),
    (
        *rules("transformer_blocks.#.", "joint_blocks.#.", BLOCK),
        *rules(
            "transformer_blocks.#.",
            "joint_blocks.#.",
            {"context_block.adaLN_modulation.1": "norm1_context.linear"},
            swap=True,
        ),
        *rules("", "", OUTSIDE),
        *rules("", "", {"final_layer.adaLN_modulation.1": "norm_out.linear"}, swap=True),
    ),
)
