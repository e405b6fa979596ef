"""Mochi 1: an image stream (x) and a narrower text stream (y), both SwiGLU with value and gate in one layer."""

from . import FLAG, NUMBER, POSITIONS, RATIO, SIZE, Family, keys

FAMILY = Family(
    name="mochi",
    title="Mochi 1",
    models="Mochi 1 preview",
    markers=("blocks.#.attn.qkv_x.weight", "blocks.#.attn.qkv_y.weight", "blocks.#.mlp_x.w1.weight"),
    w4a4=(
        "blocks.#.attn.qkv_{x,y}",
        "blocks.#.attn.proj_{x,y}",
        "blocks.#.mlp_{x,y}.{w1,w2}",
    ),
    w4a16=("blocks.#.mod_{x,y}",),
    config=keys(SIZE, "hidden_size_x hidden_size_y t5_feat_dim")
    | keys(POSITIONS, "t5_token_length")
    | keys(RATIO, "mlp_ratio_x mlp_ratio_y")
    | keys(NUMBER, "attn_drop")
    | keys(FLAG, "out_bias patch_embed_bias posenc_preserve_area timestep_mlp_bias attend_to_padding use_t5"),
)
