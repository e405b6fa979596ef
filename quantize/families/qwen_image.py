"""Qwen-Image and Qwen-Image-Edit (first, 2509, 2511), lightning merges included."""

from . import Family, all_inputs

FAMILY = Family(
    name="qwen_image",
    title="Qwen-Image",
    models="Qwen-Image, Edit, Edit-2509, Edit-2511, lightning merges",
    published="Nunchaku int4 and fp4, rank 32 and 128",
    markers=(
        "transformer_blocks.#.attn.add_q_proj.weight",
        "transformer_blocks.#.img_mlp.net.0.proj.weight",
        "transformer_blocks.#.img_mod.1.weight",
        "txt_norm.weight",
    ),
    w4a4=(
        "transformer_blocks.#.attn.to_{q,k,v}",
        "transformer_blocks.#.attn.add_{q,k,v}_proj",
        "transformer_blocks.#.attn.to_out.0",
        "transformer_blocks.#.attn.to_add_out",
        "transformer_blocks.#.{img,txt}_mlp.net.0.proj",
        "transformer_blocks.#.{img,txt}_mlp.net.2",
    ),
    w4a16=("transformer_blocks.#.{img,txt}_mod.1",),
    unsigned={"transformer_blocks.#.{img,txt}_mlp.net.2": all_inputs},
    shared_input=(
        ("transformer_blocks.#.attn.to_q", "transformer_blocks.#.attn.to_k", "transformer_blocks.#.attn.to_v"),
        (
            "transformer_blocks.#.attn.add_q_proj",
            "transformer_blocks.#.attn.add_k_proj",
            "transformer_blocks.#.attn.add_v_proj",
        ),
    ),
)
