"""Any other model: every large linear inside a repeated block becomes 4-bit, with signed activations.

A name is inside a repeated block when it has a numeric part, as in `blocks.7.attn.proj`. Modulation, normalization,
embedding and the projections at the ends of a UNet block stay in 16 bit: they are small, and their rounding reaches
every token.
"""

import re
from dataclasses import dataclass

from . import Family, LayerRule

SMALLEST = 128  # in and out features; below that a layer costs more to quantize than it saves
KEPT = re.compile(
    r"(^|_)("
    r"mod(c|x|cx|f)?|modulation|adaln|ada|norm|"  # modulation
    r"emb|embed|embedder|embedding|embeddings|time|caption|guidance|"  # embeddings
    r"t_block|scale_shift|router|gate_logits|param_generator|"
    r"proj_in|proj_out"
    r")\d*(_|$)"
)


@dataclass(frozen=True)
class GenericFamily(Family):
    def rule(self, layer: str, n: int, k: int) -> LayerRule | None:
        parts = layer.lower().split(".")
        inside_block = any(part.isdigit() for part in parts[:-1])
        kept = any(KEPT.search(part) for part in parts)
        return LayerRule("w4a4") if inside_block and not kept and min(n, k) >= SMALLEST else None


FAMILY = GenericFamily(
    name="generic",
    title="Any other model",
    models="every large linear layer inside a repeated block, by its name",
    markers=(),
    w4a4=(),
)
