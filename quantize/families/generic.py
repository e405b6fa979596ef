"""Any other model: every large linear inside a repeated block becomes 4-bit, with signed activations.

A name is inside a repeated block when it has a numeric part, as in `blocks.7.attn.proj`. Modulation, normalization
and embedding layers stay in 16 bit: they are small, and their rounding reaches every token.
"""

from dataclasses import dataclass

from . import Family, Rule

SMALLEST = 128  # in and out features; below that a layer costs more to quantize than it saves
KEPT = ("mod", "norm", "adaln", "ada_ln", "embed", "time", "t_block", "scale_shift", "gate_logits", "router")


@dataclass(frozen=True)
class GenericFamily(Family):
    def rule(self, layer: str, n: int, k: int) -> Rule | None:
        parts = layer.lower().split(".")
        inside_block = any(part.isdigit() for part in parts[:-1])
        kept = any(word in part for part in parts for word in KEPT)
        return Rule("w4a4") if inside_block and not kept and min(n, k) >= SMALLEST else None


FAMILY = GenericFamily(name="generic", markers=(), w4a4=())
