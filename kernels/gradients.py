"""The gradient of a layer, in plain torch, whichever backend has computed it: that of a dense layer of its weight.

With z = x @ W.T + (x @ down * strength) @ up.T + b, W = decode(qweight) / smooth_factor + proj_up @ proj_down.T, and
y = activation(z), straight through the rounding of the activation:

    dz = dy * activation'(z)
    dx = dz @ W + (dz @ up * strength) @ down.T         db = sum of dz over rows
    d(down) = x.T @ (dz @ up * strength)                d(up) = dz.T @ (x @ down * strength)
    d(strength)[t] = sum of (x @ down) * (dz @ up) over rows and the columns of tile t

The layer's own tensors have no gradient. Source of the straight-through rule: Bengio et al. 2013, arXiv:1308.3432.
"""

import torch
from torch.nn.functional import pad

from .layer import RANK_TILE, Layer, Lora
from .stages import low_rank, weighted, wide_dtype

Gradient = torch.Tensor | None


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """A GPU is fast in 16 bit alone, and keeps the sums of a product in float32 by itself; elsewhere float32."""
    return x.dtype if x.is_cuda else wide_dtype(x)


def times_weight(z: torch.Tensor, layer: Layer, transposed: bool) -> torch.Tensor:
    """z (M, N) @ W, transposed: z (M, K) @ W.T. Each is the derivative of the other; in the dtype of z."""
    dtype, wide = working_dtype(z), wide_dtype(z)
    weight, smooth = layer.decode_weight().to(dtype), layer.tensors.get("smooth_factor")
    act = z.to(dtype)
    if transposed:
        product = (act if smooth is None else (z.to(wide) / smooth.to(wide)).to(dtype)) @ weight.T
    else:
        product = act @ weight
        product = product if smooth is None else product.to(wide) / smooth.to(wide)
    if layer.spec.rank:
        down, up = layer["proj_down"], layer["proj_up"]
        inner, outer = (down, up) if transposed else (up, down)
        product = product + low_rank(act @ inner.to(dtype), outer)
    return product.to(z.dtype)


def through_activation(dy: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    """dz = dy * activation'(z) of `stages.activate`."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dy, z, approximate="tanh")
    if activation == "silu":  # not torch's own: that one has no derivative
        wide = z.to(wide_dtype(z))
        sigmoid = wide.sigmoid()
        return (dy * sigmoid * (1 + wide * (1 - sigmoid))).to(dy.dtype)
    return dy


def of_lora(x: torch.Tensor, dz: torch.Tensor, lora: Lora) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Gradient]:
    """The LoRA's part of dx, and d(down), d(up), d(strength): None without a strength."""
    down, up, strength = lora
    dtype = working_dtype(x)
    act, gradient = x.to(dtype) @ down.to(dtype), dz.to(dtype) @ up.to(dtype)  # (M, R') each
    inner = weighted(gradient, strength)
    dx = low_rank(inner, down).to(x.dtype)
    d_down = (x.to(dtype).T @ inner).to(down.dtype)
    d_up = (dz.to(dtype).T @ weighted(act, strength)).to(up.dtype)
    if strength is None:
        return dx, d_down, d_up, None
    columns = (act.to(wide_dtype(x)) * gradient).sum(0)
    tiles = pad(columns, (0, strength.numel() * RANK_TILE - columns.numel())).view(-1, RANK_TILE)
    return dx, d_down, d_up, tiles.sum(1).to(strength.dtype)
