"""FLUX.2 in Diffusers' names, Flux2Transformer2DModel."""

from ..dialects.nunchaku.names.flux2 import NAMES
from . import NameTable, rules_of

TABLE = NameTable(
    "FLUX.2",
    (
        "x_embedder.weight",
        "double_stream_modulation_img.linear.weight",
        "transformer_blocks.#.attn.to_q.weight",
        "single_transformer_blocks.#.attn.to_qkv_mlp_proj.weight",
    ),
    rules_of(NAMES),
)
