"""FLUX.1 in Diffusers' names, FluxTransformer2DModel."""

from ..dialects.nunchaku.names.flux import NAMES
from . import NameTable, rules_of

TABLE = NameTable(
    "FLUX.1",
    (
        "x_embedder.weight",
        "context_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.#.norm1_context.linear.weight",
        "single_transformer_blocks.#.proj_mlp.weight",
    ),
    rules_of(NAMES),
)
