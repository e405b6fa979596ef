"""Host side of expanding a weight, see launch.py."""

from collections.abc import Callable

import torch

from ...formats import E2M1_CODE, FORMATS, OFFSET_8, Format, Tensors
from ...layer import shifted_bias_term
from ...stages import Range
from . import knows
from .expand_weight import expand_weight
from .start import Launch
from .tiles import settings


class Expander:
    """W = weight * row_scales[:, None] for int8 and fp8; W / smooth_factor = weight for 16 bit

    For layers with tensors like the ones given; smooth and channel say what calls come with.
    """

    def __init__(
        self, fmt: Format, tensors: Tensors, dtype: torch.dtype, channel: bool, smooth: bool, unsigned: Range
    ) -> None:
        qweight = tensors["qweight"]
        self.n, self.k = qweight.shape[0], 2 * qweight.shape[1]
        self.unsigned, self.dtype, self.nvfp4 = unsigned, dtype, fmt.code == E2M1_CODE
        unit = fmt.units.get(dtype, 0)
        shifted = not unit and unsigned[0] != unsigned[1]
        self.two = bool(unit or shifted)
        options = settings("expand_weight", qweight.device, self.n)
        options["GROUPS"] = options.pop("BYTES") // (8 if self.nvfp4 else 32)
        flags = {
            "NVFP4": self.nvfp4,
            "AWQ": fmt.code == OFFSET_8,
            "UNIT": unit,
            "CHANNEL": channel,
            "SMOOTH": smooth,
            "SHIFT": shifted,
            **options,
        }
        self.grid = -(-self.n // options["BN"]), 1, 1
        self.launch = Launch(expand_weight, flags)

    def __call__(
        self, tensors: Tensors, channel_scales: torch.Tensor | None, smooth_factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight (N, K), row_scales (N,)), or (weight, shift (N,) or None): what the bias of a layer that does not
        shift its activations is owed"""
        qweight, wscales = tensors["qweight"], tensors["wscales"]
        weight = qweight.new_empty(self.n, self.k, dtype=self.dtype)
        beside = qweight.new_empty(self.n, dtype=torch.float32) if self.two else None
        unused = weight if beside is None else beside
        scales = wscales.view(torch.uint8) if self.nvfp4 else wscales
        pointers = (
            qweight,
            scales,
            tensors.get("wzeros", scales),
            unused if channel_scales is None else channel_scales,
            unused if smooth_factor is None else smooth_factor,
            weight,
            unused,
            unused,
        )
        self.launch(self.grid, pointers, (self.n, self.k, *wscales.stride(), *self.unsigned))
        return weight, beside


Expand = Callable[[Tensors, torch.Tensor | None, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]
"""(tensors, channel_scales, smooth_factor) -> (weight, what lies beside it), see Expander"""


def expander(fmt: Format, tensors: Tensors, dtype: torch.dtype, channel: bool, smooth: bool, unsigned: Range) -> Expand:
    """An Expander, or the format's own code where no kernel reads it: such a format still runs on expanded weights"""
    if knows(fmt):
        return Expander(fmt, tensors, dtype, channel, smooth, unsigned)

    def elsewhere(
        tensors: Tensors, channel_scales: torch.Tensor | None, smooth_factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if dtype in fmt.units:
            return fmt.expand_rows(tensors, dtype)
        weight = fmt.decode_weight(tensors)
        if smooth_factor is None:
            return weight.to(dtype), None
        shift = shifted_bias_term(weight, smooth_factor, unsigned) if unsigned[0] != unsigned[1] else None
        return (weight / smooth_factor.float()).to(dtype), shift

    return elsewhere


def expand(
    format: str,
    tensors: Tensors,
    dtype: torch.dtype,
    channel_scales: torch.Tensor | None = None,
    smooth_factor: torch.Tensor | None = None,
    unsigned: Range = (0, 0),
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Expander, for one call"""
    given = channel_scales is not None, smooth_factor is not None
    return expander(FORMATS[format], tensors, dtype, *given, unsigned)(tensors, channel_scales, smooth_factor)
