"""SDXL and SDXL-Turbo: the transformer blocks of the UNet. GEGLU is gated, so nothing is unsigned."""

from . import Family

PLACES = ("input_blocks.#.1", "middle_block.1", "output_blocks.#.1")
LAYERS = ("attn1.to_{q,k,v}", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")

FAMILY = Family(
    name="sdxl",
    title="SDXL",
    models="SDXL, SDXL-Turbo, and smaller UNets made from it",
    published="Nunchaku int4, rank 32",
    markers=(
        "input_blocks.#.1.transformer_blocks.#.attn1.to_q.weight",
        "input_blocks.#.1.transformer_blocks.#.ff.net.0.proj.weight",
        "label_emb.0.0.weight",
    ),
    absent=("input_blocks.#.1.time_stack.#.attn1.to_q.weight",),  # Stable Video Diffusion
    w4a4=tuple(f"{place}.transformer_blocks.#.{layer}" for place in PLACES for layer in LAYERS),
    keep16={
        **{f"{place}.transformer_blocks.#.attn2.to_{{k,v}}": "reads the text, a few rows" for place in PLACES},
        **{f"{place}.proj_{{in,out}}": "enters and leaves the residual path of the UNet" for place in PLACES},
        "{input_blocks,output_blocks}.#.0.emb_layers.1": "time embedding of a residual block",
        "middle_block.#.emb_layers.1": "time embedding of a residual block",
    },
    shared_input=tuple(tuple(f"{place}.transformer_blocks.#.attn1.to_{which}" for which in "qkv") for place in PLACES),
)
