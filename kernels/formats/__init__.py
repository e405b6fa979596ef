"""Number formats of a 4-bit linear layer. FORMATS is what lies in this folder.

A format says which 16 values a code can mean, how many inputs share a scale, how a weight is encoded and decoded and
what happens to the activation. A new format is one new file that defines `FORMAT`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..discover import modules

Tensors = Mapping[str, torch.Tensor]
SIXTEEN_BIT = (torch.bfloat16, torch.float16, torch.float32)  # fp32 is legal wherever a 16-bit float is expected


@dataclass(frozen=True)
class Part:
    """One tensor of a stored layer: its shape, the dtypes it may have, and whether it may be absent."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


@dataclass(frozen=True)
class Format:
    """The number grid and scale rule of one kind of layer.

    name                 as written in checkpoints and widgets
    group_size           input channels that share one weight scale
    low_rank             whether the layer carries smooth_factor, proj_down and proj_up, and may carry means
    weight_parts         (N, K) -> {name: Part} of the encoded weight alone
    encode_weight        (weight (N, K) float32, dtype of 16-bit scales) -> {name: tensor}
    decode_weight        {name: tensor} -> (N, K) float32, in the smoothed domain
    quantize_activation  (x (M, K), act_unsigned range, rule) -> (codes (M, K) uint8 nibbles, ascales (M, K/group) in
                         the dtype that is stored), or None when activations stay in 16 bit
    decode_activation    (codes, ascales, act_unsigned range) -> (M, K) float32
    act_rules            how the scale of an activation may be chosen, the stock rule first
    """

    name: str
    group_size: int
    low_rank: bool
    weight_parts: Callable[[int, int], dict[str, Part]]
    encode_weight: Callable[[torch.Tensor, torch.dtype], dict[str, torch.Tensor]]
    decode_weight: Callable[[Tensors], torch.Tensor]
    quantize_activation: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    decode_activation: Callable[[torch.Tensor, torch.Tensor, tuple[int, int]], torch.Tensor] | None = None
    act_rules: tuple[str, ...] = ("absmax",)

    def parts(self, n: int, k: int, rank: int) -> dict[str, Part]:
        """Every tensor of an (n, k) layer of this format, low-rank branch included."""
        parts = dict(self.weight_parts(n, k))
        if self.low_rank:
            parts["smooth_factor"] = Part((k,), SIXTEEN_BIT)
            if rank:
                parts["proj_down"] = Part((k, rank), SIXTEEN_BIT)
                parts["proj_up"] = Part((n, rank), SIXTEEN_BIT)
            parts["act_mean"] = Part((k,), SIXTEEN_BIT, optional=True)
            parts["out_mean"] = Part((n,), (torch.float32,), optional=True)
        return parts


def by_group(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """(..., K) -> (..., K/group_size, group_size). Raises ValueError if K is not a multiple of the group."""
    if x.shape[-1] % group_size:
        raise ValueError(f"K={x.shape[-1]} is not a multiple of the group of {group_size} input channels")
    return x.unflatten(-1, (-1, group_size))


FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in modules(sys.modules[__name__])}
