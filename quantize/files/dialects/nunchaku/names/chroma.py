"""Chroma as two community engines spell it: FLUX.1's blocks without modulation layers.

    second  spooknik/nunchaku-chroma: Diffusers' names (attn.to_qkv, ff.net.2). It computes the second MLP layers
            unsigned in int4, as Nunchaku does in FLUX.1
    first   tonera/nunchaku: the names of FLUX.1 (qkv_proj, mlp_fc2). Every layer is signed. In int4 its loader puts
            smooth_orig in the place of smooth in three layers of a double block, and so they are read here

Both join q, k, v and store linear1 and linear2 of a single block in two parts each. The small network that makes the
modulation stays in 16 bit. Source: `transformer_chroma.py` of either, tests/golden/README.md.
"""

from ..tables import Block, LinearRow, NameMap, StoredName, same


def stream(host: str, suffix: str, attention: tuple[str, ...], feed_forward: str) -> tuple[LinearRow, ...]:
    """The linears of the image or the text stream of a double block; `attention`: q, k, v, out, merged q k v."""
    q, k, v, out, merged = (f"attn.{name}" for name in attention)
    wide, narrow = f"{feed_forward}.net.0.proj", f"{feed_forward}.net.2"
    return (
        LinearRow(
            (f"{host}_attn.qkv",),
            (StoredName(merged, "3h", "h"),),
            also=((StoredName(f"qkv_proj{suffix}", "3h", "h", calibrated=True),),),
            lite=tuple(StoredName(name, "h", "h") for name in (q, k, v)),
        ),
        same(f"{host}_attn.proj", out, "h", "h", also=(f"out_proj{suffix}",)),
        same(f"{host}_mlp.0", wide, "mlp", "h", also=(f"mlp{suffix}_fc1",)),
        LinearRow(
            (f"{host}_mlp.2",),
            (StoredName(narrow, "h", "mlp", unsigned=True),),
            also=((StoredName(f"mlp{suffix}_fc2", "h", "mlp", calibrated=bool(suffix)),),),
        ),
    )


DOUBLE = Block(
    "transformer_blocks.#",
    "double_blocks.#",
    stream("img", "", ("to_q", "to_k", "to_v", "to_out.0", "to_qkv"), "ff")
    + stream("txt", "_context", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "add_qkv_proj"), "ff_context"),
    {
        "img_attn.norm.query_norm.scale": ("attn.norm_q.weight", "norm_q.weight"),
        "img_attn.norm.key_norm.scale": ("attn.norm_k.weight", "norm_k.weight"),
        "txt_attn.norm.query_norm.scale": ("attn.norm_added_q.weight", "norm_added_q.weight"),
        "txt_attn.norm.key_norm.scale": ("attn.norm_added_k.weight", "norm_added_k.weight"),
    },
)

SINGLE = Block(
    "single_transformer_blocks.#",
    "single_blocks.#",
    (
        LinearRow(
            ("linear1",),
            (StoredName("attn.to_qkv", "3h", "h"), StoredName("mlp_fc1", "mlp", "h")),
            also=((StoredName("qkv_proj", "3h", "h"), StoredName("mlp_fc1", "mlp", "h")),),
            lite=(
                *(StoredName(f"attn.to_{part}", "h", "h") for part in "qkv"),
                StoredName("proj_mlp", "mlp", "h"),
            ),
        ),
        LinearRow(
            ("linear2",),
            (StoredName("attn.to_out", "h", "h"), StoredName("mlp_fc2", "h", "mlp", unsigned=True)),
            also=((StoredName("out_proj", "h", "h"), StoredName("mlp_fc2", "h", "mlp")),),
            lite=(StoredName("proj_out", "h"),),
            join="columns",
        ),
    ),
    {
        "norm.query_norm.scale": ("attn.norm_q.weight", "norm_q.weight"),
        "norm.key_norm.scale": ("attn.norm_k.weight", "norm_k.weight"),
    },
)

MODULATION = "distilled_guidance_layer"
NETWORK = (
    Block(
        f"{MODULATION}.layers.#",
        f"{MODULATION}.layers.#",
        (same("in_layer", "linear_1", "a", "a"), same("out_layer", "linear_2", "a", "a")),
    ),
    Block(f"{MODULATION}.norms.#", f"{MODULATION}.norms.#", (), {"scale": ("weight",)}),
)

OUTSIDE = Block(
    "",
    "",
    (
        same("img_in", "x_embedder", "h"),
        same("txt_in", "context_embedder", "h"),
        same(f"{MODULATION}.in_proj", f"{MODULATION}.in_proj", "a"),
        same(f"{MODULATION}.out_proj", f"{MODULATION}.out_proj", "h", "a"),
        same("final_layer.linear", "proj_out", None, "h"),
    ),
)

NAMES = NameMap(
    "chroma",
    (
        ("single_transformer_blocks.#.mlp_fc1.qweight", "single_transformer_blocks.#.proj_mlp.qweight"),
        (f"{MODULATION}.in_proj.weight",),
    ),
    (OUTSIDE, *NETWORK, DOUBLE, SINGLE),
    v2=True,
    class_name="ChromaTransformer2DModel",
    model_class="NunchakuChromaTransformer2DModel",
    variants={
        "transformer_blocks.#.qkv_proj.qweight": "Chroma in the names of tonera/nunchaku: its second MLP layers are "
        "signed",
        "transformer_blocks.#.attn.to_qkv.qweight": "Chroma in the names of spooknik/nunchaku-chroma: in int4 its "
        "second MLP layers are unsigned",
    },
)
