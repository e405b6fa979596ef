"""AuraFlow in Diffusers' names, AuraFlowTransformer2DModel."""

from . import NameTable, rules

ATTENTION = {f"attn.w2{to[0]}": f"attn.to_{end}" for to, end in zip("qkvo", ("q", "k", "v", "out.0"), strict=True)}
ADDED = {f"attn.w1{name}": f"attn.add_{name}_proj" for name in "qkv"}
FEED_FORWARD = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}

DOUBLE = {
    **ATTENTION,
    **ADDED,
    "attn.w1o": "attn.to_add_out",
    **{f"mlpX.{name}": f"ff.{stored}" for name, stored in FEED_FORWARD.items()},
    **{f"mlpC.{name}": f"ff_context.{stored}" for name, stored in FEED_FORWARD.items()},
    "modX.1": "norm1.linear",
    "modC.1": "norm1_context.linear",
}
SINGLE = {
    **{name.replace("w2", "w1"): stored for name, stored in ATTENTION.items()},
    **{f"mlp.{name}": f"ff.{stored}" for name, stored in FEED_FORWARD.items()},
    "modCX.1": "norm1.linear",
}
OUTSIDE = {
    "positional_encoding": "pos_embed.pos_embed",
    "register_tokens": "register_tokens",
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "cond_seq_linear": "context_embedder",
    "init_x_linear": "pos_embed.proj",
    "final_linear": "proj_out",
}

TABLE = NameTable(
    "AuraFlow",
    ("joint_transformer_blocks.#.attn.add_q_proj.weight", "time_step_proj.linear_1.weight", "register_tokens"),
    (
        *rules("joint_transformer_blocks.#.", "double_layers.#.", DOUBLE),
        *rules("single_transformer_blocks.#.", "single_layers.#.", SINGLE),
        *rules("", "", OUTSIDE),
        *rules("", "", {"modF.1": "norm_out.linear"}, swap=True),
    ),
)
