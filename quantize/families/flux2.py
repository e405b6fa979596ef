"""FLUX.2: dev and klein. One modulation for all blocks, SwiGLU instead of GELU, so nothing is unsigned."""

from . import QK_NORMS, Family

FAMILY = Family(
    name="flux2",
    title="FLUX.2",
    models="dev, klein",
    published="community klein files with Nunchaku names",
    markers=(
        "double_stream_modulation_img.lin.weight",
        "single_stream_modulation.lin.weight",
        "double_blocks.#.img_attn.qkv.weight",
        "single_blocks.#.linear1.weight",
    ),
    aliases=QK_NORMS,
    # the three modulation layers stay in 16 bit: 2 % of the weights, and their rounding reaches every block
    w4a4=(
        "double_blocks.#.{img,txt}_attn.qkv",
        "double_blocks.#.{img,txt}_attn.proj",
        "double_blocks.#.{img,txt}_mlp.0",
        "double_blocks.#.{img,txt}_mlp.2",
        "single_blocks.#.linear1",
        "single_blocks.#.linear2",
    ),
)
