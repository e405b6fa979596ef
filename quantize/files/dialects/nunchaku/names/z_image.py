"""Z-Image and Z-Image-Turbo: Diffusers' names with a standard feed-forward.

Its fused input projection holds w3 (value) in the first half of the rows and w1 (gate) in the second. Modulation is
ordinary here: 16 bit, not interleaved. Refiners may be stored in 16 bit under the same names, with q, k, v apart.
"""

from ..tables import Block, LinearRow, NameMap, StoredName, same

ATTENTION = tuple(StoredName(f"attention.to_{name}", "h", "h") for name in "qkv")
GATED = (StoredName("feed_forward.w3", "mlp", "h"), StoredName("feed_forward.w1", "mlp", "h"))

LINEARS = (
    LinearRow(("attention.qkv",), (StoredName("attention.to_qkv", "3h", "h"),), lite=ATTENTION, bias=False),
    same("attention.out", "attention.to_out.0", "h", "h").but(bias=False),
    LinearRow(
        ("feed_forward.w3", "feed_forward.w1"),
        (StoredName("feed_forward.net.0.proj", "2mlp", "h"),),
        lite=GATED,
        bias=False,
        plain="stored",
    ),
    same("feed_forward.w2", "feed_forward.net.2", "h", "mlp", lite="feed_forward.w2").but(bias=False),
)
TENSORS = {
    "attention.q_norm.weight": ("attention.norm_q.weight",),
    "attention.k_norm.weight": ("attention.norm_k.weight",),
    **{name: (name,) for name in (f"{kind}_norm{i}.weight" for kind in ("attention", "ffn") for i in (1, 2))},
}
MODULATED = (*LINEARS, same("adaLN_modulation.0", "adaLN_modulation.0", "4h"))

OUTSIDE = Block(
    "",
    "",
    (
        same("x_embedder", "all_x_embedder.2-1", "h", also=("x_embedder",)),
        same("final_layer.linear", "all_final_layer.2-1.linear", None, "h", also=("final_layer.linear",)),
        same(
            "final_layer.adaLN_modulation.1",
            "all_final_layer.2-1.adaLN_modulation.1",
            "h",
            also=("final_layer.adaLN_modulation.1",),
        ),
        same("cap_embedder.1", "cap_embedder.1", "h"),
        same("t_embedder.mlp.0", "t_embedder.mlp.0"),
        same("t_embedder.mlp.2", "t_embedder.mlp.2"),
    ),
    {"cap_embedder.0.weight": ("cap_embedder.0.weight",)},
    {name: (name,) for name in ("x_pad_token", "cap_pad_token", "norm_final.weight")},
)

NAMES = NameMap(
    "z_image",
    (("layers.#.attention.to_qkv.qweight", "layers.#.attention.to_q.qweight"),),
    (
        Block("layers.#", "layers.#", MODULATED, TENSORS),
        Block("noise_refiner.#", "noise_refiner.#", MODULATED, TENSORS),
        Block("context_refiner.#", "context_refiner.#", LINEARS, TENSORS),
        OUTSIDE,
    ),
    v2=True,
    mlp_ratio=8 / 3,
    class_name="ZImageTransformer2DModel",
    model_class="NunchakuZImageTransformer2DModel",
)
