"""Z-Image and Z-Image-Turbo: Diffusers' names with a standard feed-forward.

Its fused input projection holds w3 (value) in the first half of the rows and w1 (gate) in the second. Modulation is
ordinary here: 16 bit, not interleaved. Refiners may be stored in 16 bit under the same names, with q, k, v apart.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .....families.z_image import FAMILY
from ..tables import Block, Infos, LinearRow, NameMap, StoredName, count_blocks, same
from .flux import rotary_axes

SKIPPED = "skip_refiners"

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
    replace(
        same("feed_forward.w2", "feed_forward.net.2", "h", "mlp", lite="feed_forward.w2").but(bias=False),
        plain="stored",
    ),
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


def config(infos: Infos, known: Mapping[str, Any]) -> dict[str, Any]:
    """Diffusers' ZImageTransformer2DModel"""
    hidden, channels = infos["x_embedder.weight"].shape
    head = infos["layers.0.attention.q_norm.weight"].shape[0]
    heads = hidden // head
    return {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": channels // 4,
        "dim": hidden,
        "n_layers": count_blocks(infos, "layers"),
        "n_refiner_layers": count_blocks(infos, "noise_refiner"),
        "n_heads": heads,
        "n_kv_heads": (infos["layers.0.attention.qkv.weight"].shape[0] // head - heads) // 2,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": infos["cap_embedder.1.weight"].shape[1],
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": list(known.get("axes_dims") or rotary_axes(head, head // 4)),
        "axes_lens": list(known.get("axes_lens") or (1536, 512, 512)),
    }


NAMES = NameMap(
    "z_image",
    (("layers.#.attention.to_qkv.qweight", "layers.#.attention.to_q.qweight"),),
    (
        Block("layers.#", "layers.#", MODULATED, TENSORS),
        Block("noise_refiner.#", "noise_refiner.#", MODULATED, TENSORS, skipped=SKIPPED),
        Block("context_refiner.#", "context_refiner.#", LINEARS, TENSORS, skipped=SKIPPED),
        OUTSIDE,
    ),
    v2=True,
    mlp_ratio=8 / 3,
    class_name="ZImageTransformer2DModel",
    model_class="NunchakuZImageTransformer2DModel",
    unwanted=FAMILY.unread,
    config=config,
)
