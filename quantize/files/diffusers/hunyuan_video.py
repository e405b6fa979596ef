"""HunyuanVideo in Diffusers' names, HunyuanVideoTransformer3DModel: the blocks of FLUX.1, and a refiner of the text."""

from ..dialects.nunchaku.names.flux import NAMES
from . import NameTable, rules, rules_of

REFINER = {
    "adaLN_modulation.1": "norm_out.linear",  # not swapped, as the name would have it
    "self_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "self_attn.proj": "attn.to_out.0",
    "mlp.0": "ff.net.0.proj",
    "mlp.2": "ff.net.2",
    "norm1": "norm1",
    "norm2": "norm2",
}
TEXT = {
    "input_embedder": "proj_in",
    "t_embedder.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "c_embedder.in_layer": "time_text_embed.text_embedder.linear_1",
    "c_embedder.out_layer": "time_text_embed.text_embedder.linear_2",
}

TABLE = NameTable(
    "HunyuanVideo",
    (
        "x_embedder.proj.weight",
        "context_embedder.proj_in.weight",
        "context_embedder.token_refiner.refiner_blocks.#.attn.to_q.weight",
        "single_transformer_blocks.#.proj_mlp.weight",
    ),
    (
        *rules(
            "context_embedder.token_refiner.refiner_blocks.#.", "txt_in.individual_token_refiner.blocks.#.", REFINER
        ),
        *rules("context_embedder.", "txt_in.", TEXT),
        *rules("", "", {"img_in.proj": "x_embedder.proj"}),
        *(rule for rule in rules_of(NAMES) if rule.host not in ("img_in", "txt_in")),
    ),
)
