"""Model families: which linears of a model become 4-bit, and how. FAMILIES is what lies in this folder.

A family is a table over ComfyUI's own layer names. In a pattern `#` stands for a block number. A model that no table
knows still works through `generic.py`. A new family is one new file that defines `FAMILY`.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from ...kernels.discover import modules

Channels = Callable[[int, int], tuple[int, int]]


def all_inputs(n: int, k: int) -> tuple[int, int]:
    """The whole input comes out of a GELU."""
    return 0, k


def inputs_after_out_features(n: int, k: int) -> tuple[int, int]:
    """Channels N.. come out of a GELU: FLUX joins the attention output (N wide) and the MLP activation."""
    return n, k


@dataclass(frozen=True)
class Rule:
    """What becomes of one linear layer."""

    kind: str  # "w4a4" or "w4a16"
    act_unsigned: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Family:
    """One model architecture as tables of layer-name patterns.

    markers       every one must match a key of the model for `detect` to say yes
    w4a4          layers with 4-bit weights and activations and a low-rank branch
    w4a16         modulation layers: 4-bit weights, 16-bit activations, few rows
    unsigned      pattern -> which input channels come out of a GELU (int4 only; E2M1 has a sign bit)
    shared_input  layers of one block that read the same activation
    """

    name: str
    markers: tuple[str, ...]
    w4a4: tuple[str, ...]
    w4a16: tuple[str, ...] = ()
    unsigned: Mapping[str, Channels] = field(default_factory=dict)
    shared_input: tuple[tuple[str, ...], ...] = ()

    def detect(self, keys: Iterable[str]) -> bool:
        """Whether the key names of a model (weights included, e.g. `img_in.weight`) are of this family."""
        keys = list(keys)
        return all(any(pattern(marker).fullmatch(key) for key in keys) for marker in self.markers)

    def rule(self, layer: str, n: int, k: int) -> Rule | None:
        """How the linear `layer` of shape (n, k) is quantized; None leaves it in 16 bit."""
        if any(pattern(entry).fullmatch(layer) for entry in self.w4a16):
            return Rule("w4a16")
        if not any(pattern(entry).fullmatch(layer) for entry in self.w4a4):
            return None
        for entry, channels in self.unsigned.items():
            if pattern(entry).fullmatch(layer):
                return Rule("w4a4", channels(n, k))
        return Rule("w4a4")


@cache
def pattern(text: str) -> re.Pattern[str]:
    """`#` is a number, `*` any run without a dot, everything else is literal."""
    wild = {"#": r"\d+", "*": r"[^.]+"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in re.split(r"([#*])", text)))


class FamilyError(ValueError):
    """A model belongs to no family or to several."""


FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in modules(sys.modules[__name__])}


def detect(keys: Iterable[str]) -> Family:
    """The one family whose markers match `keys`, or the generic one. Raises FamilyError if several match."""
    keys = list(keys)
    found = [family for family in FAMILIES.values() if family.markers and family.detect(keys)]
    if len(found) > 1:
        raise FamilyError(f"the model matches several families: {', '.join(family.name for family in found)}")
    return found[0] if found else FAMILIES["generic"]
