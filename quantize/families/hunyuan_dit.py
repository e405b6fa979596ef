"""HunyuanDiT 1.0 to 1.2: a DiT with long skip connections and cross attention."""

from . import POSITIONS, SIZE, Family, all_inputs, keys

FAMILY = Family(
    name="hunyuan_dit",
    title="HunyuanDiT",
    models="HunyuanDiT 1.0, 1.1, 1.2",
    markers=("blocks.#.attn1.Wqkv.weight", "blocks.#.attn2.kv_proj.weight", "mlp_t5.0.weight"),
    w4a4=(
        "blocks.#.attn1.{Wqkv,out_proj}",
        "blocks.#.attn2.{q_proj,out_proj}",
        "blocks.#.mlp.{fc1,fc2}",
        "blocks.#.skip_linear",
    ),
    keep16={
        "blocks.#.attn2.kv_proj": "reads the text, a few rows",
        "blocks.#.default_modulation.1": "one shift per block: small",
    },
    unsigned={"blocks.#.mlp.fc2": all_inputs},
    config=keys(SIZE, "text_states_dim text_states_dim_t5") | keys(POSITIONS, "text_len text_len_t5"),
)
