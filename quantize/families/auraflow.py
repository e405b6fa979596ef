"""AuraFlow: joint blocks, then single blocks, all SwiGLU."""

from . import SIZE, Family, keys

FAMILY = Family(
    name="auraflow",
    title="AuraFlow",
    models="AuraFlow 0.1 to 0.3, Pony v7",
    markers=(
        "double_layers.#.attn.w1q.weight",
        "single_layers.#.mlp.c_fc1.weight",
        "cond_seq_linear.weight",
    ),
    w4a4=(
        "double_layers.#.attn.{w1,w2}{q,k,v,o}",
        "double_layers.#.{mlpC,mlpX}.{c_fc1,c_fc2,c_proj}",
        "single_layers.#.attn.w1{q,k,v,o}",
        "single_layers.#.mlp.{c_fc1,c_fc2,c_proj}",
    ),
    w4a16=("double_layers.#.{modC,modX}.1", "single_layers.#.modCX.1"),
    shared_input=(
        tuple(f"{{double_layers,single_layers}}.#.attn.{{w1,w2}}{which}" for which in "qkv"),
        tuple(f"{{double_layers,single_layers}}.#.{{mlp,mlpC,mlpX}}.c_fc{which}" for which in "12"),
    ),
    config=keys(SIZE, "cond_seq_dim global_conddim"),
)
