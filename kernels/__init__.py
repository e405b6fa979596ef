"""LAYER 1: tensors in, tensors out. The public operations; arguments are checked here, once.

The only library below this line is torch; a backend may bring its own.
"""

from functools import cache

import torch

from .dispatch import COMPUTES, Choice, choose
from .formats import FORMATS
from .layer import Layer, LayerError, LayerSpec

__all__ = ["COMPUTES", "FORMATS", "Choice", "Layer", "LayerError", "LayerSpec", "choose", "svdquant_linear"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_choose = cache(choose)


def svdquant_linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None = None,
    lora: tuple[torch.Tensor, torch.Tensor] | None = None,
    compute: str = "auto",
) -> torch.Tensor:
    """y = Q(x / smooth_factor) @ decode(qweight).T + (x @ proj_down) @ proj_up.T + bias [+ (x @ lora_down) @ lora_up.T]

    x        (..., K) bf16, fp16, fp32 (or fp64, as an oracle); any leading dimensions, also empty
    layer    tensors on the device of x
    bias     (N,) or None
    lora     (lora_down (K, R'), lora_up (N, R')) or None: the user's LoRA, more columns of the same branch
    compute  w4a4 quantizes activations as well, w16 does not, auto takes the best one that a backend runs
    returns  (..., N) in the dtype of x; sums are kept in float32. NaN in a row of x gives NaN in that row of y
    raises   ValueError for a wrong dtype, device or shape, or when no backend can run the call
    """
    spec = layer.spec
    if x.dtype not in FLOATS:
        raise ValueError(f"x has dtype {x.dtype}, needed one of {', '.join(map(str, FLOATS))}")
    if x.shape[-1:] != (spec.k,):
        raise ValueError(f"x has shape {tuple(x.shape)}, this {spec.format} layer needs (..., {spec.k})")
    if x.device != layer["qweight"].device:
        raise ValueError(f"x is on {x.device} and the layer on {layer['qweight'].device}: move one of them")
    if bias is not None and bias.shape != (spec.n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, needed ({spec.n},)")
    if lora is not None:
        _check_lora(lora, spec)
    chosen = _choose(spec.format, x.device, x.dtype, compute)
    y = chosen.backend.linear(x.reshape(-1, spec.k), layer, bias, lora, chosen.compute)
    return y.view(*x.shape[:-1], spec.n)


def _check_lora(lora: tuple[torch.Tensor, torch.Tensor], spec: LayerSpec) -> None:
    down, up = lora
    if down.shape[0] != spec.k or up.shape[0] != spec.n or down.shape[1:] != up.shape[1:]:
        raise ValueError(
            f"LoRA factors {tuple(down.shape)} and {tuple(up.shape)} do not fit, needed ({spec.k}, R) and ({spec.n}, R)"
        )
