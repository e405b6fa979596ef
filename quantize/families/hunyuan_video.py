"""HunyuanVideo (1.0, 1.5, image to video) and HunyuanImage 2.1: FLUX.1 blocks behind a refiner of the text tokens."""

from . import FLAG, QK_NORMS, Family, all_inputs, inputs_after_out_features, keys

FAMILY = Family(
    name="hunyuan_video",
    title="HunyuanVideo",
    models="HunyuanVideo, HunyuanVideo-I2V, 1.5, SkyReels, HunyuanImage 2.1",
    markers=(
        "txt_in.individual_token_refiner.blocks.#.self_attn.qkv.weight",
        "double_blocks.#.img_attn.qkv.weight",
        "double_blocks.#.img_mod.lin.weight",
        "single_blocks.#.linear1.weight",
    ),
    aliases=(  # the first release; ComfyUI renames it while it loads
        ("_attn_qkv.", "_attn.qkv."),
        ("_attn_proj.", "_attn.proj."),
        ("_mod.linear.", "_mod.lin."),
        (".modulation.linear.", ".modulation.lin."),
        ("mlp.fc1.", "mlp.0."),
        ("mlp.fc2.", "mlp.2."),
        ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
        ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
        ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
        ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
        ("_in.mlp.0.", "_in.in_layer."),
        ("_in.mlp.2.", "_in.out_layer."),
        ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
        ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
        (".q_norm.weight", ".norm.query_norm.scale"),
        (".k_norm.weight", ".norm.key_norm.scale"),
        *QK_NORMS,
    ),
    w4a4=(
        "double_blocks.#.{img,txt}_attn.qkv",
        "double_blocks.#.{img,txt}_attn.proj",
        "double_blocks.#.{img,txt}_mlp.0",
        "double_blocks.#.{img,txt}_mlp.2",
        "single_blocks.#.linear1",
        "single_blocks.#.linear2",
    ),
    w4a16=("double_blocks.#.{img,txt}_mod.lin", "single_blocks.#.modulation.lin"),
    keep16={
        f"txt_in.individual_token_refiner.blocks.#.{layer}": "part of the text embedding"
        for layer in ("self_attn.{qkv,proj}", "mlp.{0,2}", "adaLN_modulation.1")
    },
    unsigned={
        "double_blocks.#.{img,txt}_mlp.2": all_inputs,
        "single_blocks.#.linear2": inputs_after_out_features,
    },
    config=keys(FLAG, "byt5 meanflow meanflow_sum use_cond_type_embedding"),
)
