"""HiDream-I1 and E1: joint attention and a mixture of SwiGLU experts."""

from . import BLOCKS, INDEX, Family, keys

BLOCK = "{double,single}_stream_blocks.#.block"

FAMILY = Family(
    name="hidream",
    title="HiDream",
    models="HiDream-I1 full, dev, fast, HiDream-E1",
    markers=(
        "double_stream_blocks.#.block.attn1.to_q_t.weight",
        "single_stream_blocks.#.block.ff_i.experts.#.w1.weight",
        "caption_projection.#.linear.weight",
    ),
    w4a4=(
        f"{BLOCK}.attn1.to_{{q,k,v,out}}",
        f"{BLOCK}.attn1.to_{{q,k,v,out}}_t",
        f"{BLOCK}.ff_i.{{w1,w2,w3}}",  # variants without experts
        f"{BLOCK}.ff_i.shared_experts.{{w1,w2,w3}}",
        f"{BLOCK}.ff_i.experts.#.{{w1,w2,w3}}",
        f"{BLOCK}.ff_t.{{w1,w2,w3}}",
    ),
    w4a16=(f"{BLOCK}.adaLN_modulation.1",),
    keep16={"caption_projection.#.linear": "reads raw text features with extreme outliers"},
    shared_input=(
        tuple(f"{BLOCK}.attn1.to_{which}" for which in "qkv"),
        tuple(f"{BLOCK}.attn1.to_{which}_t" for which in "qkv"),
        (f"{BLOCK}.ff_i.w1", f"{BLOCK}.ff_i.w3"),
        (f"{BLOCK}.ff_i.shared_experts.w1", f"{BLOCK}.ff_i.shared_experts.w3"),
        (f"{BLOCK}.ff_i.experts.#.w1", f"{BLOCK}.ff_i.experts.#.w3"),
        (f"{BLOCK}.ff_t.w1", f"{BLOCK}.ff_t.w3"),
    ),
    config=keys(INDEX, "llama_layers") | keys(BLOCKS, "num_routed_experts num_activated_experts"),
)
