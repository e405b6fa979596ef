"""FLUX.2 (klein, dev) as community files spell it: the names of FLUX.1, but gated MLPs, no biases, shared modulation.

The fused linears of a single block are stored in two parts each, as in FLUX.1. SwiGLU is (gate, value) in Diffusers
and in ComfyUI. Writers put a bias of zeros everywhere; it is dropped, because the model has none.
"""

from ..tables import Block, LinearRow, NameMap, StoredName, same


def stream(host: str, suffix: str, attention: tuple[str, ...], feed_forward: str) -> tuple[LinearRow, ...]:
    q, k, v, out, merged = (f"attn.{name}" for name in attention)
    linear_in, linear_out = f"{feed_forward}.linear_in", f"{feed_forward}.linear_out"
    return (
        LinearRow(
            (f"{host}_attn.qkv",),
            (StoredName(f"qkv_proj{suffix}", "3h", "h"),),
            also=((StoredName(merged, "3h", "h"),),),
            lite=tuple(StoredName(name, "h", "h") for name in (q, k, v)),
            bias=False,
        ),
        same(f"{host}_attn.proj", f"out_proj{suffix}", "h", "h", also=(out,), lite=out).but(bias=False),
        same(f"{host}_mlp.0", f"mlp{suffix}_fc1", "2mlp", "h", also=(linear_in,), lite=linear_in).but(bias=False),
        same(f"{host}_mlp.2", f"mlp{suffix}_fc2", "h", "mlp", also=(linear_out,), lite=linear_out).but(bias=False),
    )


DOUBLE = Block(
    "transformer_blocks.#",
    "double_blocks.#",
    stream("img", "", ("to_q", "to_k", "to_v", "to_out.0", "to_qkv"), "ff")
    + stream("txt", "_context", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_added_qkv"), "ff_context"),
    {
        "img_attn.norm.query_norm.scale": ("norm_q.weight", "attn.norm_q.weight"),
        "img_attn.norm.key_norm.scale": ("norm_k.weight", "attn.norm_k.weight"),
        "txt_attn.norm.query_norm.scale": ("norm_added_q.weight", "attn.norm_added_q.weight"),
        "txt_attn.norm.key_norm.scale": ("norm_added_k.weight", "attn.norm_added_k.weight"),
    },
)

SINGLE = Block(
    "single_transformer_blocks.#",
    "single_blocks.#",
    (
        LinearRow(
            ("linear1",),
            (StoredName("qkv_proj", "3h", "h"), StoredName("mlp_fc1", "2mlp", "h")),
            also=((StoredName("attn.qkv_proj", "3h", "h"), StoredName("attn.mlp_fc1", "2mlp", "h")),),
            lite=(StoredName("attn.to_qkv_mlp_proj", None, "h"),),
            bias=False,
        ),
        LinearRow(
            ("linear2",),
            (StoredName("out_proj", "h", "h"), StoredName("mlp_fc2", "h", "mlp")),
            also=((StoredName("attn.out_proj", "h", "h"), StoredName("attn.mlp_fc2", "h", "mlp")),),
            lite=(StoredName("attn.to_out", "h"),),
            join="columns",
            bias=False,
        ),
    ),
    {
        "norm.query_norm.scale": ("norm_q.weight", "attn.norm_q.weight"),
        "norm.key_norm.scale": ("norm_k.weight", "attn.norm_k.weight"),
    },
)


def embedder(host: str, stored: str, optional: bool = False) -> Block:
    linears = (
        same("in_layer", "linear_1", "h").but(bias=False),
        same("out_layer", "linear_2", "h", "h").but(bias=False),
    )
    return Block(f"time_guidance_embed.{stored}", host, linears, optional=optional)


EMBEDDERS = (
    embedder("time_in", "timestep_embedder"),
    embedder("guidance_in", "guidance_embedder", optional=True),  # klein has none
)

OUTSIDE = Block(
    "",
    "",
    (
        same("img_in", "x_embedder", "h").but(bias=False),
        same("txt_in", "context_embedder", "h").but(bias=False),
        same("double_stream_modulation_img.lin", "double_stream_modulation_img.linear", "6h", "h").but(bias=False),
        same("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear", "6h", "h").but(bias=False),
        same("single_stream_modulation.lin", "single_stream_modulation.linear", "3h", "h").but(bias=False),
        same("final_layer.adaLN_modulation.1", "norm_out.linear", "2h", "h").but(swap=True, bias=False),
        same("final_layer.linear", "proj_out", None, "h").but(bias=False),
    ),
)

NAMES = NameMap(
    "flux2",
    (
        (
            "single_transformer_blocks.#.mlp_fc1.qweight",
            "single_transformer_blocks.#.attn.mlp_fc1.qweight",
            "single_transformer_blocks.#.attn.to_qkv_mlp_proj.qweight",
        ),
        ("double_stream_modulation_img.linear.qweight", "double_stream_modulation_img.linear.weight"),
    ),
    (OUTSIDE, *EMBEDDERS, DOUBLE, SINGLE),
    mlp_ratio=3.0,
    zero_biases=True,
    class_name="Flux2Transformer2DModel",
    model_class="NunchakuFlux2Transformer2DModel",
)
