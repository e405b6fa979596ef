"""Stable Diffusion 3 and 3.5 (medium, large, turbo): the MMDiT."""

from . import INDEX, LINEAR, NUMBER, POSITIONS, Family, all_inputs, keys

FAMILY = Family(
    name="sd3",
    title="SD3.5",
    models="SD3 medium, SD3.5 medium, large, large turbo",
    markers=("joint_blocks.#.context_block.attn.qkv.weight", "joint_blocks.#.x_block.mlp.fc1.weight"),
    # attn2 of SD3.5 medium reads another modulation of the same norm than attn: not shared
    w4a4=(
        "joint_blocks.#.{x,context}_block.attn.{qkv,proj}",
        "joint_blocks.#.x_block.attn2.{qkv,proj}",
        "joint_blocks.#.{x,context}_block.mlp.{fc1,fc2}",
    ),
    w4a16=("joint_blocks.#.{x,context}_block.adaLN_modulation.1",),
    unsigned={"joint_blocks.#.{x,context}_block.mlp.fc2": all_inputs},
    config=keys(POSITIONS, "num_patches pos_embed_max_size")
    | keys(NUMBER, "pos_embed_scaling_factor")
    | keys(INDEX, "x_block_self_attn_layers")
    | keys(LINEAR, "context_embedder_config"),
)
