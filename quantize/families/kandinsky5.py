"""Kandinsky 5: image and video. ComfyUI has the class since 0.4."""

from . import BLOCKS, NUMBER, SIZE, Family, keys

FAMILY = Family(
    name="kandinsky5",
    title="Kandinsky 5",
    models="image, video lite, video pro",
    markers=(
        "visual_transformer_blocks.#.self_attention.to_query.weight",
        "visual_transformer_blocks.#.cross_attention.to_key.weight",
        "text_transformer_blocks.#.self_attention.to_query.weight",
    ),
    w4a4=(
        "visual_transformer_blocks.#.{self,cross}_attention.to_{query,key,value}",
        "visual_transformer_blocks.#.{self,cross}_attention.out_layer",
        "visual_transformer_blocks.#.feed_forward.{in,out}_layer",
    ),
    keep16={
        "visual_transformer_blocks.#.visual_modulation.out_layer": "512 inputs: small",
        "text_transformer_blocks.#.text_modulation.out_layer": "512 inputs: small",
        "text_transformer_blocks.#.self_attention.{to_query,to_key,to_value,out_layer}": "two to four blocks of text",
        "text_transformer_blocks.#.feed_forward.{in,out}_layer": "two to four blocks of text",
    },
    # GELU, but not unsigned: the second MLP layer has no bias that could take the shift
    shared_input=(
        tuple(f"visual_transformer_blocks.#.self_attention.to_{which}" for which in ("query", "key", "value")),
        tuple(f"visual_transformer_blocks.#.cross_attention.to_{which}" for which in ("key", "value")),
    ),
    config=keys(SIZE, "model_dim ff_dim in_text_dim in_text_dim2 visual_embed_dim")
    | keys(BLOCKS, "num_text_blocks num_visual_blocks")
    | keys(NUMBER, "rope_scale_factor"),
)
