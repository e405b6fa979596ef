"""Chroma in Diffusers' names, ChromaTransformer2DModel: the blocks of FLUX.1 without modulation layers."""

from ..dialects.nunchaku.names.flux import NAMES
from . import NameTable, rules, rules_of

GUIDANCE = "distilled_guidance_layer."

TABLE = NameTable(
    "Chroma",
    (
        "x_embedder.weight",
        "context_embedder.weight",
        "distilled_guidance_layer.layers.#.linear_1.weight",
        "single_transformer_blocks.#.proj_mlp.weight",
    ),
    (
        *(rule for rule in rules_of(NAMES) if not rule.host.endswith(("_mod.lin", ".modulation.lin"))),
        *rules(GUIDANCE, GUIDANCE, {name: name for name in ("in_proj", "out_proj")}),
        *rules(GUIDANCE, GUIDANCE, {"layers.#.in_layer": "layers.#.linear_1", "norms.#.scale": "norms.#.weight"}),
        *rules(GUIDANCE, GUIDANCE, {"layers.#.out_layer": "layers.#.linear_2"}),
    ),
)
