"""Chroma and Chroma Radiance: FLUX.1 blocks whose modulation comes from one small network outside the blocks."""

from . import QK_NORMS, Family, all_inputs, inputs_after_out_features

FAMILY = Family(
    name="chroma",
    title="Chroma",
    models="Chroma, Chroma Radiance",
    published="community int4 and fp4, in the names of tonera/nunchaku and spooknik/nunchaku-chroma",
    markers=(
        "distilled_guidance_layer.in_proj.weight",
        "double_blocks.#.img_attn.qkv.weight",
        "single_blocks.#.linear1.weight",
    ),
    aliases=(
        *QK_NORMS,
        *((f"_layer.norms.{i}.weight", f"_layer.norms.{i}.scale") for i in range(5)),  # of distilled_guidance_layer
        (".norm.weight", ".norm.scale"),  # of Radiance's pixel decoder
    ),
    w4a4=(
        "double_blocks.#.{img,txt}_attn.qkv",
        "double_blocks.#.{img,txt}_attn.proj",
        "double_blocks.#.{img,txt}_mlp.0",
        "double_blocks.#.{img,txt}_mlp.2",
        "single_blocks.#.linear1",
        "single_blocks.#.linear2",
    ),
    keep16={
        "distilled_guidance_layer.layers.#.{in,out}_layer": "makes the modulation of every block",
        "nerf_blocks.#.param_generator": "makes the weights of the pixel decoder",
    },
    unsigned={
        "double_blocks.#.{img,txt}_mlp.2": all_inputs,
        "single_blocks.#.linear2": inputs_after_out_features,
    },
)
