"""Mochi 1: an image stream (x) and a narrower text stream (y), both SwiGLU with value and gate in one layer."""

from . import Family

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
)
