"""FLUX.1: dev, schnell, fill, depth, canny, kontext, krea and their finetunes share one set of layers."""

from . import QK_NORMS, Family, all_inputs, inputs_after_out_features

FAMILY = Family(
    name="flux",
    title="FLUX.1",
    models="dev, schnell, fill, depth, canny, kontext, krea, and with redux",
    published="Nunchaku int4 and fp4, rank 32",
    markers=(
        "double_blocks.#.img_attn.qkv.weight",
        "double_blocks.#.img_mod.lin.weight",
        "double_blocks.#.img_mlp.0.weight",
        "single_blocks.#.linear1.weight",
        "single_blocks.#.modulation.lin.weight",
        "vector_in.in_layer.weight",
        "img_in.weight",
        "txt_in.weight",
    ),
    aliases=QK_NORMS,
    w4a4=(
        "double_blocks.#.img_attn.qkv",
        "double_blocks.#.txt_attn.qkv",
        "double_blocks.#.img_attn.proj",
        "double_blocks.#.txt_attn.proj",
        "double_blocks.#.img_mlp.0",
        "double_blocks.#.txt_mlp.0",
        "double_blocks.#.img_mlp.2",
        "double_blocks.#.txt_mlp.2",
        "single_blocks.#.linear1",
        "single_blocks.#.linear2",
    ),
    w4a16=(
        "double_blocks.#.img_mod.lin",
        "double_blocks.#.txt_mod.lin",
        "single_blocks.#.modulation.lin",
    ),
    unsigned={
        "double_blocks.#.img_mlp.2": all_inputs,
        "double_blocks.#.txt_mlp.2": all_inputs,
        "single_blocks.#.linear2": inputs_after_out_features,
    },
    # none shared: ComfyUI has q, k, v in one layer, and q, k, v and the MLP in another
)
