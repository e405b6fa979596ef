"""How a Nunchaku file names the layers of one model, as tables. `names/` holds one file per model family.

A stored name and ComfyUI's name belong together block by block: `#` is the block number. Sizes are written with
symbols, "h" (the hidden size) and "mlp" (the width inside the MLP), each optionally with a factor: "3h".
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from ...tensor_file import TensorInfo

NUMBER = "#"
Infos = Mapping[str, TensorInfo]
Config = Callable[[Infos, Mapping[str, Any]], dict[str, Any]]
"""config(infos, known): a model's configuration, from its tensors under ComfyUI's names as 16 bit has them, and from
ComfyUI's own configuration where the file holds it, for what no tensor shows"""


@dataclass(frozen=True)
class StoredName:
    """One stored linear: name within its block, out and in features (None: anything), GELU in front of it.

    calibrated  whether, in a format of 16-bit scales, its activation is divided by smooth_factor_orig
    """

    name: str
    n: str | None = None
    k: str | None = None
    unsigned: bool = False
    calibrated: bool = False


@dataclass(frozen=True)
class LinearRow:
    """Stored linears and the linears of ComfyUI that they are.

    host    one name, or several when ComfyUI has separate linears where the file has one (equal shares of its rows).
            A spelling of as many parts as there are host names has them apart as well
    stored  one part, or several that are joined into the one host linear
    also    other spellings of `stored` that are read
    lite    how Nunchaku Lite spells it, where that differs: the names of Diffusers, nothing merged
    join    "rows": outputs side by side, or "columns": inputs side by side, outputs added
    chunks  modulation layer whose rows lie interleaved, that many to a channel, with +1 in the bias of the scales
    swap    the two halves of the rows are exchanged in ComfyUI (scale, shift -> shift, scale)
    bias    whether ComfyUI's linear has one; a stored bias of zeros is dropped where it has none
    plain   how it is written in 16 bit: "lite" (apart, Diffusers' names) or "stored"
    """

    host: tuple[str, ...]
    stored: tuple[StoredName, ...]
    also: tuple[tuple[StoredName, ...], ...] = ()
    lite: tuple[StoredName, ...] = ()
    join: str = "rows"
    chunks: int = 0
    swap: bool = False
    bias: bool = True
    plain: str = "lite"
    optional: bool = False

    @property
    def spellings(self) -> tuple[tuple[StoredName, ...], ...]:
        """Every spelling, Nunchaku's own first."""
        return (self.stored, *self.also, *((self.lite,) if self.lite else ()))

    def but(
        self,
        *,
        unsigned: bool = False,
        chunks: int = 0,
        swap: bool = False,
        bias: bool = True,
        optional: bool = False,
    ) -> "LinearRow":
        """This row, and what is given holds of it as well; `unsigned` holds of all its spellings but the lite one."""
        parts = (self.stored, *self.also)
        stored, *also = (tuple(replace(part, unsigned=unsigned or part.unsigned) for part in each) for each in parts)
        return replace(
            self,
            stored=stored,
            also=tuple(also),
            chunks=chunks or self.chunks,
            swap=swap or self.swap,
            bias=bias and self.bias,
            optional=optional or self.optional,
        )


def same(
    host: str,
    stored: str,
    n: str | None = None,
    k: str | None = None,
    also: tuple[str, ...] = (),
    lite: str = "",
) -> LinearRow:
    """A row of a table, for a linear that is one in the file and one in ComfyUI; the parameters are its columns."""
    return LinearRow(
        (host,),
        (StoredName(stored, n, k),),
        tuple((StoredName(name, n, k),) for name in also),
        (StoredName(lite, n, k),) if lite else (),
    )


@dataclass(frozen=True)
class Block:
    """A group of layers that comes once, or once per block number where the names hold `#`.

    tensors   ComfyUI's name -> stored names, of vectors and other tensors that are no linear
    optional  whether a model may do without the whole group, or without single blocks of it
    skipped   the word of quantization_config which says that all of it is in 16 bit; "" where the class has it in 4 bit
    """

    stored: str
    host: str
    linears: tuple[LinearRow, ...] = ()
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional_tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: bool = False
    skipped: str = ""

    def stored_name(self, number: int | None, name: str) -> str:
        return _join(self.stored, number, name)

    def host_name(self, number: int | None, name: str) -> str:
        return _join(self.host, number, name)


def _join(prefix: str, number: int | None, name: str) -> str:
    prefix = prefix if number is None else prefix.replace(NUMBER, str(number))
    return f"{prefix}.{name}" if prefix else name


def split_name(prefix: str, name: str) -> tuple[int | None, str] | None:
    """(block number, name within the block) of a full name, or None if it is not in the block. Inverse: `_join`."""
    if not prefix:
        return None, name
    found = _prefix_pattern(prefix).match(name)
    if found is None:
        return None
    number, rest = found.groups() if NUMBER in prefix else (None, found.group(1))
    return (None if number is None else int(number)), rest


@cache
def _prefix_pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(re.escape(prefix).replace(re.escape(NUMBER), r"(\d+)") + r"\.(.+)")


@dataclass(frozen=True)
class NameMap:
    """One model family as Nunchaku spells it.

    needs        groups of key patterns; of each group at least one must match for the file to be of this family
    v2           whether it is written with the newer suffixes (proj_down, smooth_factor)
    mlp_ratio    mlp = mlp_ratio * h, where the stored size (a multiple of 128) does not contradict it
    zero_biases  whether 4-bit layers without a bias are written with one of zeros
    row_scales   whether a factor for the tensor is written as one for each row, because the class has no other
    unwanted     tensors of ComfyUI's model that the class does not have, and does not load
    class_name   Diffusers' class, for the header
    model_class  Nunchaku's class, for the header
    variants     key pattern -> what a file that has such a key is, where engines differ
    config       what Diffusers builds its class from
    comfy        {"model_class", "model_config"} that ComfyUI-nunchaku builds ComfyUI's class from, where it reads that
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    blocks: tuple[Block, ...]
    v2: bool = False
    mlp_ratio: float = 4.0
    zero_biases: bool = False
    row_scales: bool = False
    unwanted: tuple[str, ...] = ()
    class_name: str = ""
    model_class: str = ""
    variants: Mapping[str, str] = field(default_factory=dict)
    config: Config = lambda infos, known: {}
    comfy: Config | None = None

    def detect(self, keys: Iterable[str]) -> bool:
        """Whether the tensor names of a file are of this family."""
        keys = list(keys)
        return all(any(_in(text, keys) for text in group) for group in self.needs)

    def variant(self, keys: Iterable[str]) -> tuple[str, ...]:
        """What is said of a file with these names, in `variants`."""
        keys = list(keys)
        return tuple(text for pattern, text in self.variants.items() if _in(pattern, keys))


def _in(text: str, keys: Iterable[str]) -> bool:
    return any(map(key_pattern(text).fullmatch, keys))


@cache
def key_pattern(text: str) -> re.Pattern[str]:
    """`#` is a number, `*` anything, everything else is literal."""
    wild = {"#": r"\d+", "*": r".+"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in re.split(r"([#*])", text)))


class Sizes:
    """Symbols of one file and what is known of them, e.g. h = 3072.

    Bound once by a tensor that is stored unpadded, used for every other one.
    """

    def __init__(self, mlp_ratio: float = 4.0) -> None:
        self.known: dict[str, int] = {}
        self.mlp_ratio = mlp_ratio

    def bind(self, text: str | None, size: int) -> None:
        """Learn from an exact size; a known symbol keeps its value."""
        if text is not None:
            factor, symbol = _factor(text)
            if size % factor == 0:
                self.known.setdefault(symbol, size // factor)

    def value(self, text: str | None) -> int | None:
        """The size that `text` stands for, None if it is not known."""
        if text is None:
            return None
        factor, symbol = _factor(text)
        return factor * self.known[symbol] if symbol in self.known else None

    def guess(self, text: str | None, padded: int, tile: int) -> int:
        """The size behind a stored, padded one: the known value, else by mlp_ratio if that pads to it, else as is."""
        known = self.value(text)
        if known is not None:
            return known
        if text is not None and _factor(text)[1] == "mlp" and "h" in self.known:
            guessed = _factor(text)[0] * int(self.mlp_ratio * self.known["h"])
            if guessed + -guessed % tile == padded:
                return guessed
        return padded


def _factor(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"(\d*)(\w+)", text)
    if match is None:
        raise ValueError(f"size {text!r} of a table, needed a symbol with or without a factor, such as 3h")
    return int(match[1] or 1), match[2]


def count_blocks(infos: Infos, prefix: str) -> int:
    """Blocks that a model has under this prefix: one more than the largest number.

    >>> count_blocks(dict.fromkeys(["blocks.0.a.weight", "blocks.11.a.weight"]), "blocks")
    12
    """
    numbers = (name.removeprefix(f"{prefix}.").split(".")[0] for name in infos if name.startswith(f"{prefix}."))
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)
