"""LTX-Video, and LTX-2 whose audio stream has the same layers with `audio_` in front."""

from . import Family, all_inputs

FAMILY = Family(
    name="ltxv",
    title="LTX-Video",
    models="LTX-Video 2B and 13B, LTX-2",
    markers=(
        "patchify_proj.weight",
        "adaln_single.linear.weight",
        "transformer_blocks.#.attn1.to_q.weight",
        "transformer_blocks.#.attn2.to_k.weight",
        "transformer_blocks.#.ff.net.0.proj.weight",
    ),
    w4a4=(
        "transformer_blocks.#.{attn1,attn2,audio_attn1,audio_attn2,audio_to_video_attn,video_to_audio_attn}.to_{q,k,v}",
        "transformer_blocks.#.{attn1,attn2,audio_attn1,audio_attn2,audio_to_video_attn,video_to_audio_attn}.to_out.0",
        "transformer_blocks.#.{ff,audio_ff}.net.0.proj",
        "transformer_blocks.#.{ff,audio_ff}.net.2",
    ),
    unsigned={"transformer_blocks.#.{ff,audio_ff}.net.2": all_inputs},
    shared_input=(
        tuple(f"transformer_blocks.#.{{attn1,audio_attn1}}.to_{which}" for which in "qkv"),
        tuple(
            f"transformer_blocks.#.{{attn2,audio_attn2,audio_to_video_attn,video_to_audio_attn}}.to_{which}"
            for which in "kv"
        ),
    ),
)
