"""Wan 2.1 and 2.2, text and image to video, and what is built on them (VACE, camera, HuMo, S2V, Animate)."""

from . import BLOCKS, INDEX, SIZE, Family, all_inputs, keys

FAMILY = Family(
    name="wan",
    title="Wan 2.1 / 2.2",
    models="t2v, i2v, ti2v, VACE, Fun control, camera, HuMo, S2V, Animate",
    markers=(
        "blocks.#.self_attn.q.weight",
        "blocks.#.cross_attn.k.weight",
        "blocks.#.ffn.0.weight",
        "patch_embedding.weight",
        "head.modulation",
    ),
    # k and v of the cross attention are 15 % of the weights, too much for 16 bit
    w4a4=(
        "{blocks,vace_blocks}.#.{self_attn,cross_attn}.{q,k,v,o}",
        "{blocks,vace_blocks}.#.cross_attn.{k,v}_img",
        "{blocks,vace_blocks}.#.ffn.{0,2}",
    ),
    keep16={"vace_blocks.#.{before,after}_proj": "carries the control signal into the residual path"},
    unsigned={"{blocks,vace_blocks}.#.ffn.2": all_inputs},
    shared_input=(
        tuple(f"{{blocks,vace_blocks}}.#.self_attn.{which}" for which in "qkv"),
        tuple(f"{{blocks,vace_blocks}}.#.cross_attn.{which}" for which in "kv"),
        tuple(f"{{blocks,vace_blocks}}.#.cross_attn.{which}_img" for which in "kv"),
    ),
    config=keys(INDEX, "window_size") | keys(BLOCKS, "vace_layers") | keys(SIZE, "vace_in_dim"),
)
