"""Cosmos 1 world models (7B, 14B): blocks of self attention, cross attention and MLP, in this order."""

from . import FLAG, NAME, Family, keys

FAMILY = Family(
    name="cosmos",
    title="Cosmos 1",
    models="text to world, video to world, 7B and 14B",
    markers=("blocks.block#.blocks.0.block.attn.to_q.0.weight", "blocks.block#.blocks.2.block.layer1.weight"),
    w4a4=(
        "blocks.block#.blocks.#.block.attn.to_{q,k,v,out}.0",
        "blocks.block#.blocks.#.block.layer{1,2}",
    ),
    keep16={"blocks.block#.blocks.#.adaLN_modulation.{1,2}": "modulation through 256 channels: small"},
    # GELU, but not unsigned: the second MLP layer has no bias that could take the shift
    shared_input=(
        tuple(f"blocks.block#.blocks.0.block.attn.to_{which}.0" for which in "qkv"),
        tuple(f"blocks.block#.blocks.1.block.attn.to_{which}.0" for which in "kv"),
    ),
    config=keys(NAME, "block_config block_x_format extra_per_block_abs_pos_emb_type") | keys(FLAG, "affline_emb_norm"),
)
