"""Settings of one quantization run. They are written into the checkpoint."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ..kernels.formats import DEFAULT, FORMATS, MODULATION
from ..kernels.layer import RANK_TILE

LARGEST_AUTO_RANK = 128  # LoRAs are appended to the branch, and kernels slow down above 256 columns in all
HESSIAN_STEP = 64  # columns: blocks of a Hessian are multiples of it, so that they hold whole groups
LARGEST_SIZE = 10**18  # bytes: beyond any disk
OWN, SHARED = "own", "shared"  # low-rank branches of layers that read one input
KEEP_16BIT = "16bit"  # the choice for modulation layers that stay as they are
WITH_BRANCH = tuple(name for name, fmt in FORMATS.items() if fmt.low_rank)  # formats with 4-bit activations
WITHOUT_BRANCH = tuple(name for name, fmt in FORMATS.items() if not fmt.low_rank)  # with 16-bit ones

# what each named recipe changes; `fast` is the table of defaults below
NAMED: dict[str, dict[str, Any]] = {
    "fast": {},
    "balanced": {"smoothing": "noise_model", "adam_steps": 60, "start_rounds": 4, "rounds": 3, "centring": True},
    "best": {"smoothing": "noise_model", "adam_steps": 120, "start_rounds": 12, "rounds": 5, "centring": True},
    "svdquant": {"smoothing": "grid", "rounds": 0},
    "svdquant+gptq": {"smoothing": "grid", "rounds": 0},
}


@dataclass(frozen=True)
class Recipe:
    """How a 16-bit model becomes a 4-bit one. One with a value out of range cannot be made.

    The name stands for the steps, the other fields for their settings: a name with the smoothing of another one is
    refused, and a setting of a step that the named recipe does not take has no effect.

    name             `fast` needs no data; `balanced` and `best` need statistics; `svdquant` and `svdquant+gptq` are
                     the reference quantizer's steps, to measure ours against
    format           of layers with 4-bit activations: kernels/formats
    rank             width of the low-rank branch, a multiple of 16
    auto_rank        choose the rank of each layer (0 to 128) so that together they take the bytes of `rank`, or fill
                     target_size
    target_size      bytes of the finished file, 0 for no limit
    fallback         layers with a predicted or measured error above this, and those that cost the model most, get 8-bit
                     activations; layers still above it stay in 16 bit. 0 to keep every layer 4-bit
    act8_share       at most this share of the multiply-adds gets 8-bit activations, worst layers first
    branches         of layers that read one input: "own" for each; or "shared": they are fitted as one, and have one
                     proj_down, which engines that store them as one need to have them at this rank
    activation       "stock", or "best": the finest rule for activation scales that the format has, for backends with it
    smoothing        "weight_spans" (data-free), "noise_model" or "grid" (the reference's 39 points)
    smooth_power     weight_spans: smooth_factor = span of the weight's input channel ** -smooth_power, 0 to 1
    alternations     fast: at most this many rounds of {low-rank fit, round}, 1 or more; the best is kept
    adam_steps       of the noise model's descent
    start_rounds     rounds of {low-rank fit, round to nearest} before the first GPTQ
    rounds           rounds of {scales, GPTQ, low-rank refit}; with 0 the low-rank branch of the start is kept
    damping          of the Hessian, relative to its mean diagonal
    refit_damping    of the refit's metric, times channels per token
    hessian_block    widest block of a layer's Hessian, 64 or more; wider layers get a block-diagonal one, which takes
                     less memory
    input_noise      follow the correlation of an activation with its rounding error, where tokens suffice (50 per
                     channel) and the layer is better for it on held-out tokens
    centring         take the mean off each activation channel before it is rounded, and add what that takes again
    bias_correction  whether the bias takes up the mean error
    modulation       format of modulation layers, or "16bit" to leave them alone
    seed             of the randomized SVD
    raises           ValueError that names field, value and what is needed

        >>> Recipe(rank=64, seed=7).needs_data
        False
        >>> Recipe(rank=33)
        Traceback (most recent call last):
        ValueError: rank is 33, needed a multiple of 16, or 0 for no low-rank branch
    """

    name: str = "fast"
    format: str = DEFAULT
    rank: int = 32
    auto_rank: bool = False
    target_size: int = 0
    fallback: float = 0.0
    act8_share: float = 0.1
    branches: str = OWN
    activation: str = "stock"
    smoothing: str = "weight_spans"
    smooth_power: float = 0.5
    alternations: int = 8
    adam_steps: int = 0
    start_rounds: int = 0
    rounds: int = 0
    damping: float = 0.01
    refit_damping: float = 0.01
    hessian_block: int = 16384
    input_noise: bool = False
    centring: bool = False
    bias_correction: bool = True
    modulation: str = MODULATION
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (fits, needed) in _NEEDED.items():
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"{name} is {_said(value)}, needed {needed}")
            if isinstance(getattr(type(self), name), float):
                object.__setattr__(self, name, float(value))  # 0 and 0.0 are one recipe, and have one hash
        smoothing = NAMED[self.name].get("smoothing", "weight_spans")
        if self.smoothing != smoothing:
            raise ValueError(
                f"smoothing is {self.smoothing!r}, needed {smoothing!r} for the recipe {self.name!r}: start from the "
                "named recipe whose steps you want"
            )

    @classmethod
    def named(cls, name: str, **changes: Any) -> "Recipe":
        """A named recipe with some settings changed.

        >>> best = Recipe.named("best", rank=64)
        >>> best.rank, best.rounds, best.needs_data
        (64, 5, True)
        """
        if not _is_word(name, NAMED):
            raise ValueError(f"recipe is {_said(name)}, known are {', '.join(NAMED)}")
        return cls(name=name, **(NAMED[name] | changes))

    @property
    def needs_data(self) -> bool:
        return self.smoothing != "weight_spans"

    @property
    def act_rule(self) -> str:
        """How activation scales are chosen, as LayerSpec names it."""
        return FORMATS[self.format].act_rules[-1 if self.activation == "best" else 0]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def hash(self) -> str:
        """Of every setting: work done under another recipe is not taken up again."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


def bytes_of(gigabytes: float) -> int:
    """Bytes of a size in GB, for `target_size`.

    raises  ValueError for NaN, infinite and negative ones, and for more than any disk has

        >>> bytes_of(6.5)
        6500000000
    """
    if not 0 <= gigabytes <= LARGEST_SIZE / 10**9:
        raise ValueError(f"target_size is {gigabytes} GB, needed a number of gigabytes, or 0 for no limit")
    return int(gigabytes * 10**9)


def _said(value: object) -> str:
    """A value in a message, however long it is; Python has no digits for the largest numbers."""
    try:
        text = repr(value)
    except ValueError:
        text = f"a number of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_word(value: object, known: Iterable[str]) -> bool:
    return isinstance(value, str) and value in known


def _word(*known: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: _is_word(value, known), " or ".join(known)


def _whole(least: int, needed: str, step: int = 1, most: int = (1 << 63) - 1) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda value: (
            isinstance(value, int) and not isinstance(value, bool) and least <= value <= most and value % step == 0
        ),
        needed,
    )


def _number(least: float, most: float, needed: str) -> tuple[Callable[[Any], bool], str]:
    """NaN is in no range."""
    return (
        lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most,
        needed,
    )


_BOOL: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "True or False")
_ROUNDS = _whole(0, "a whole number of rounds, 0 or more")
# field -> whether a value is legal, and what is needed
_NEEDED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": _word(*NAMED),
    "format": _word(*WITH_BRANCH),
    "branches": _word(OWN, SHARED),
    "activation": _word("stock", "best"),
    "smoothing": _word("weight_spans", "noise_model", "grid"),
    "modulation": _word(*WITHOUT_BRANCH, KEEP_16BIT),
    "rank": _whole(0, f"a multiple of {RANK_TILE}, or 0 for no low-rank branch", RANK_TILE),
    "auto_rank": _BOOL,
    "target_size": _whole(0, "a whole number of bytes, or 0 for no limit", most=LARGEST_SIZE),
    "fallback": _number(0, sys.float_info.max, "a relative error, or 0 to keep every layer 4-bit"),
    "act8_share": _number(0, 1, "a share from 0 to 1 of the multiply-adds"),
    "smooth_power": _number(0, 1, "a power from 0 to 1"),
    "alternations": _whole(1, "a whole number of rounds, 1 or more"),
    "adam_steps": _whole(0, "a whole number of steps, 0 or more"),
    "start_rounds": _ROUNDS,
    "rounds": _ROUNDS,
    "damping": _number(1e-6, 1, "a factor from 1e-6 to 1 of the mean diagonal"),  # a singular Hessian needs some
    "refit_damping": _number(0, 1, "a factor from 0 to 1 of the mean diagonal"),
    "hessian_block": _whole(HESSIAN_STEP, f"a whole number of columns, {HESSIAN_STEP} or more"),
    "input_noise": _BOOL,
    "centring": _BOOL,
    "bias_correction": _BOOL,
    "seed": _whole(0, "a whole number from 0 to 2^63 - 1"),
}
