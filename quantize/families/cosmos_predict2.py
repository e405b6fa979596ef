"""Cosmos Predict2 (2B, 14B) and what is finetuned from it."""

from . import BASE, FLAG, Family, keys

FAMILY = Family(
    name="cosmos_predict2",
    title="Cosmos Predict2",
    models="text to image, video to world, 2B and 14B",
    markers=(
        "blocks.#.self_attn.q_proj.weight",
        "blocks.#.cross_attn.output_proj.weight",
        "blocks.#.mlp.layer1.weight",
        "x_embedder.proj.1.weight",
    ),
    w4a4=(
        "blocks.#.{self_attn,cross_attn}.{q,k,v,output}_proj",
        "blocks.#.mlp.layer{1,2}",
    ),
    keep16={
        "blocks.#.adaln_modulation_{self_attn,cross_attn,mlp}.{1,2}": "modulation through 256 channels: small",
    },
    # GELU, but not unsigned: the second MLP layer has no bias that could take the shift
    shared_input=(
        tuple(f"blocks.#.self_attn.{which}_proj" for which in "qkv"),
        tuple(f"blocks.#.cross_attn.{which}_proj" for which in "kv"),
    ),
    config=keys(BASE, "min_fps max_fps") | keys(FLAG, "rope_enable_fps_modulation"),
)
