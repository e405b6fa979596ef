"""What the public operation refuses beside a layer that cannot exist, each with what came and what was needed."""

from collections.abc import Sequence
from typing import Any

import torch

from .layer import RANK_TILE, Layer, Lora

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ACTIVATIONS = ("", "gelu", "silu")


def one_of(name: str, found: Any, known: Sequence[Any]) -> None:
    if found not in known:
        raise ValueError(f"{name} is {found!r}, known are {', '.join(map(repr, known))}")


def same_device(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"x is on {x.device} and {name} on {tensor.device}: move one of them")


def floating(name: str, found: torch.Tensor) -> None:
    if found.dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {found.dtype}, needed one of {', '.join(map(str, FLOATS))}")


def activation_input(x: torch.Tensor, layer: Layer) -> None:
    """x is (..., K) in a floating dtype, on the layer's device"""
    floating("x", x)
    if x.shape[-1:] != (layer.spec.k,):
        raise ValueError(f"x has shape {tuple(x.shape)}, this {layer.spec.format} layer needs (..., {layer.spec.k})")
    same_device("the layer", layer["qweight"], x)


def vector(name: str, found: torch.Tensor | None, size: int, x: torch.Tensor) -> None:
    if found is None:
        return
    if found.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(found.shape)}, needed ({size},)")
    floating(name, found)
    same_device(name, found, x)


def lora(found: Lora, n: int, k: int, x: torch.Tensor) -> None:
    down, up, strength = found
    if down.dim() != 2 or down.shape[0] != k or up.shape != (n, down.shape[1]):
        raise ValueError(
            f"LoRA factors {tuple(down.shape)} and {tuple(up.shape)} do not fit, needed ({k}, R) and ({n}, R)"
        )
    for factor in (down, up):
        floating("the LoRA", factor)
        same_device("the LoRA", factor, x)
    vector("the LoRA's strength", strength, -(-down.shape[1] // RANK_TILE), x)
