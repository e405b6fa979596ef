"""Model families: which linears of a model become 4-bit, and how. FAMILIES is what lies in this folder.

A family is a table over ComfyUI's own layer names. In a pattern `#` stands for a number, `*` for anything without a
dot and `{a,b}` for either. A model that no table knows still works through `generic.py`. A new family is one new file
that defines `FAMILY`.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from ...kernels.discover import modules
from ..model_config import BASE as BASE
from ..model_config import BLOCKS as BLOCKS
from ..model_config import FLAG as FLAG
from ..model_config import INDEX as INDEX
from ..model_config import LINEAR as LINEAR
from ..model_config import NAME as NAME
from ..model_config import NUMBER as NUMBER
from ..model_config import POSITIONS as POSITIONS
from ..model_config import RATIO as RATIO
from ..model_config import SIZE as SIZE
from ..model_config import Kind
from ..model_config import keys as keys

Channels = Callable[[int, int], tuple[int, int]]
# newer ComfyUIs call the norms of q and k `weight` and read both names, older ones read `scale` alone
QK_NORMS = ((".query_norm.weight", ".query_norm.scale"), (".key_norm.weight", ".key_norm.scale"))
log = logging.getLogger("svdquant")


def all_inputs(n: int, k: int) -> tuple[int, int]:
    """The whole input comes out of a GELU."""
    return 0, k


def inputs_after_out_features(n: int, k: int) -> tuple[int, int]:
    """Channels N.. come out of a GELU: FLUX joins the attention output (N wide) and the MLP activation."""
    return n, k


@dataclass(frozen=True)
class LayerRule:
    """What becomes of one linear layer."""

    kind: str  # "w4a4" or "w4a16"
    act_unsigned: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Family:
    """One model architecture as tables of layer-name patterns.

    title         for people
    models        what people call the models of this family
    markers       every one must match a key of the model for `detect` to say yes
    absent        none may match a key
    aliases       (written in some files, the name that every ComfyUI reads), parts of a key, replaced in this order
    w4a4          layers with 4-bit weights and activations and a low-rank branch
    w4a16         modulation layers: 4-bit weights, 16-bit activations, few rows
    keep16        layers inside blocks that stay in 16 bit -> why. What no table names stays in 16 bit as well
    unsigned      pattern -> which input channels come out of a GELU (int4 only; E2M1 has a sign bit). GELU means
                  tanh or erf, whose minimum of -0.17 fits the shift; never SiLU, never the product of a gated unit,
                  and only where ComfyUI's layer has a bias: that is where the shift goes
    shared_input  layers of one block that read the same activation: one smoothing, one quantization of it
    config        keys of ComfyUI's model configuration that this family alone has and a file may set -> what they hold
    published     4-bit files that exist
    refused       why this pack cannot run the family at all
    unread        16-bit tensors that no step of the model reads: files may leave them out
    """

    name: str
    markers: tuple[str, ...]
    w4a4: tuple[str, ...]
    w4a16: tuple[str, ...] = ()
    unsigned: Mapping[str, Channels] = field(default_factory=dict)
    shared_input: tuple[tuple[str, ...], ...] = ()
    title: str = ""
    models: str = ""
    absent: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    keep16: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Kind] = field(default_factory=dict)
    published: str = ""
    refused: str = ""
    unread: tuple[str, ...] = ()

    def canonical(self, key: str) -> str:
        """A key of a model file under the name that every ComfyUI reads."""
        for written, name in self.aliases:
            key = key.replace(written, name)
        return key

    def detect(self, keys: Iterable[str]) -> bool:
        """Whether the key names of a model (weights included, e.g. `img_in.weight`) are of this family."""
        keys = [self.canonical(key) for key in keys]

        def found(marker: str) -> bool:
            return any(pattern(marker).fullmatch(key) for key in keys)

        return all(map(found, self.markers)) and not any(map(found, self.absent))

    def rule(self, layer: str, n: int, k: int) -> LayerRule | None:
        """How the linear `layer` of shape (n, k) is quantized; None leaves it in 16 bit."""
        if any(pattern(entry).fullmatch(layer) for entry in self.w4a16):
            return LayerRule("w4a16")
        if not any(pattern(entry).fullmatch(layer) for entry in self.w4a4):
            return None
        for entry, channels in self.unsigned.items():
            if pattern(entry).fullmatch(layer):
                return LayerRule("w4a4", channels(n, k))
        return LayerRule("w4a4")

    def shared_groups(self, layers: Iterable[str]) -> list[tuple[str, ...]]:
        """Those of `layers` that read the same activation, group by group, in the order of the table."""
        groups: dict[tuple[int, tuple[str, ...]], dict[int, str]] = {}
        for layer in layers:
            for table, entries in enumerate(self.shared_input):
                for place, entry in enumerate(entries):
                    match = pattern(entry).fullmatch(layer)
                    if match:
                        groups.setdefault((table, match.groups()), {})[place] = layer
        found = ([group[place] for place in sorted(group)] for group in groups.values())
        return [tuple(group) for group in found if len(group) > 1]


@cache
def pattern(text: str) -> re.Pattern[str]:
    """`#` is a number, `*` any run without a dot, `{a,b}` either, each a group; everything else is literal."""

    def expression(part: str) -> str:
        if part.startswith("{"):
            return "({})".format("|".join(map(re.escape, part[1:-1].split(","))))
        return {"#": r"(\d+)", "*": r"([^.]+)"}.get(part) or re.escape(part)

    return re.compile("".join(map(expression, re.split(r"([#*]|\{[^}]*\})", text))))


class FamilyError(ValueError):
    """A model belongs to no family that this pack can run, or to several."""


_ALL = [module.FAMILY for module in modules(sys.modules[__name__])]
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL if not family.refused}
REFUSED: dict[str, Family] = {family.name: family for family in _ALL if family.refused}


def detect(keys: Iterable[str]) -> Family:
    """The one family whose markers match `keys`, or the generic one, which is logged.

    raises  FamilyError if several match, or one that cannot be run

        >>> parts = ("attn.add_q_proj", "img_mlp.net.0.proj", "img_mod.1")
        >>> detect(["txt_norm.weight", *(f"transformer_blocks.0.{part}.weight" for part in parts)]).name
        'qwen_image'
        >>> detect(["blocks.0.proj.weight", "blocks.1.proj.weight"]).name
        'generic'
    """
    keys = list(keys)
    found = [family for family in _ALL if family.markers and family.detect(keys)]
    if len(found) > 1:
        raise FamilyError(f"the model matches several families: {', '.join(family.name for family in found)}")
    if not found:
        log.warning(
            "no family table knows this model; the generic rule is used: every large linear layer inside a repeated "
            "block becomes 4-bit, with signed activations"
        )
        return FAMILIES["generic"]
    if found[0].refused:
        raise FamilyError(f"this is a {found[0].title} model: {found[0].refused}")
    return found[0]
