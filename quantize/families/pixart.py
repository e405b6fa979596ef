"""PixArt-Sigma and PixArt-Alpha. Modulation is one layer for all blocks."""

from . import FLAG, POSITIONS, Family, all_inputs, keys

FAMILY = Family(
    name="pixart",
    title="PixArt",
    models="PixArt-Sigma, PixArt-Alpha",
    markers=(
        "blocks.#.attn.qkv.weight",
        "blocks.#.cross_attn.kv_linear.weight",
        "blocks.#.mlp.fc1.weight",
        "t_block.1.weight",
    ),
    w4a4=(
        "blocks.#.attn.{qkv,proj}",
        "blocks.#.cross_attn.{q_linear,proj}",
        "blocks.#.mlp.{fc1,fc2}",
    ),
    keep16={"blocks.#.cross_attn.kv_linear": "reads the text, a few rows; kept in the reference as well"},
    unsigned={"blocks.#.mlp.fc2": all_inputs},
    config=keys(POSITIONS, "model_max_length") | keys(FLAG, "micro_condition"),
)
