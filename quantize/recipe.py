"""Settings of one quantization run. They are written into the checkpoint."""

from dataclasses import asdict, dataclass
from typing import Any

RANK_MULTIPLE = 16  # the width of a tensor-core tile


@dataclass(frozen=True)
class Recipe:
    """How a 16-bit model becomes a 4-bit one.

    name           the recipe's name; `fast` needs no data
    format         int4 or nvfp4
    rank           width of the low-rank branch, a multiple of 16
    smooth_power   smooth_factor = span of the weight's input channel ** -smooth_power, geometric mean 1
    alternations   at most this many rounds of {low-rank fit, round}; the best is kept
    modulation     "awq_w4a16", or "16bit" to leave modulation layers alone
    seed           of the randomized SVD
    """

    name: str = "fast"
    format: str = "int4"
    rank: int = 32
    smooth_power: float = 0.5
    alternations: int = 8
    modulation: str = "awq_w4a16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.format not in ("int4", "nvfp4"):
            raise ValueError(f"format is {self.format!r}, needed int4 or nvfp4")
        if self.rank < 0 or self.rank % RANK_MULTIPLE:
            raise ValueError(f"rank is {self.rank}, needed a multiple of {RANK_MULTIPLE}, or 0 for no low-rank branch")
        if self.modulation not in ("awq_w4a16", "16bit"):
            raise ValueError(f"modulation is {self.modulation!r}, needed awq_w4a16 or 16bit")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
