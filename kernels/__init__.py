"""LAYER 1: tensors in, tensors out. `svdquant_linear` is a whole 4-bit layer, on any device.

    >>> import torch
    >>> fmt = FORMATS["int4"]
    >>> weight = torch.randn(96, 128)
    >>> tensors = fmt.encode_weight(weight, torch.bfloat16) | {"smooth_factor": torch.ones(128)}
    >>> layer = Layer(LayerSpec("int4", n=96, k=128), tensors)
    >>> svdquant_linear(torch.randn(2, 5, 128), layer).shape
    torch.Size([2, 5, 96])

The only library below this line is torch; a backend may bring its own.
"""

import torch

from .dispatch import Choice, choose, computes_of
from .formats import FORMATS
from .layer import Layer, LayerError, LayerSpec, Lora
from .modes import COMPUTES
from .prepared import Prepared, checked_linear

__all__ = [
    "COMPUTES",
    "FORMATS",
    "Choice",
    "Layer",
    "LayerError",
    "LayerSpec",
    "Lora",
    "Prepared",
    "choose",
    "computes_of",
    "svdquant_linear",
]


def svdquant_linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None = None,
    lora: Lora | tuple[torch.Tensor, ...] | None = None,
    compute: str = "auto",
    activation: str = "",
) -> torch.Tensor:
    """y = Q(x / smooth_factor) @ decode(qweight).T + (x @ proj_down) @ proj_up.T + bias [+ (x @ lora.down) @ lora.up.T]

    A layer with act_mean and out_mean has x - act_mean in place of the first x, and + out_mean.

    x        (..., K) bf16, fp16, fp32 (or fp64, as an oracle); any leading dimensions, also empty, also strided
    layer    its tensors on the device of x
    bias     (N,) or None
    lora     (down (K, R'), up (N, R')) and maybe a strength for each 16 columns, see Lora; or None
    compute  w4a4 quantizes activations as well, w16 does not, auto takes the first mode of the format that runs
    activation  "", "gelu" (tanh form) or "silu", applied to y
    returns  (..., N) in the dtype of x; sums are kept in float32. NaN in a row of x gives NaN in that row of y
    raises   ValueError for a wrong dtype, device or shape, or when no backend can run the call

        >>> weight = FORMATS["int4"].encode_weight(2 * torch.eye(64), torch.float32)
        >>> layer = Layer(LayerSpec("int4", n=64, k=64), weight | {"smooth_factor": torch.ones(64)})
        >>> x = torch.arange(-7.0, 8.0).repeat(5)[:64].view(1, 64)  # on int4's own grid
        >>> svdquant_linear(x, layer, bias=torch.full((64,), 0.5), compute="w4a4")[0, :4]
        tensor([-13.5000, -11.5000,  -9.5000,  -7.5000])
    """
    return checked_linear(x, layer, bias, None if lora is None else Lora(*lora), compute, activation)
