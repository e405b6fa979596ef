"""SDXL in Diffusers' names, UNet2DConditionModel with an additional embedding."""

from ..dialects.nunchaku.names.sdxl import NAMES
from . import NameTable, rules_of

TABLE = NameTable(
    "SDXL",
    (
        "conv_in.weight",
        "add_embedding.linear_1.weight",
        "down_blocks.#.resnets.#.conv1.weight",
        "down_blocks.#.attentions.#.transformer_blocks.#.attn1.to_q.weight",
    ),
    rules_of(NAMES),
)
