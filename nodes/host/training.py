"""Bridge: ComfyUI's node TrainLora on 4-bit layers.

The node makes a function f of every weight from the weight's shape, and the host puts f(W) in the place of W. A 4-bit
layer runs f beside its own product:

    y = layer(x) + x @ (f(W) - W).T

f(W) - W of a LoRA is two thin products, and W is not decoded for it. Any other f is given the decoded weight, LoRAs
that are loaded included: as exact, at the price of a 16-bit layer. Gradients are those of kernels/gradients.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.weight_adapter.lora
import torch
from torch.nn.functional import linear

from ...quantize.lora.deltas import LoraError

Layer = Any
"""An SVDQuantLinear, whose module imports this one"""

LORA = getattr(comfy.weight_adapter.lora, "LoraDiff", None)  # the host's LoRA in training; without it, any function


@dataclass(frozen=True, eq=False)
class BesideWeight:
    """A function of the weight as the host may hold it: it is moved and counted, and leaves the bytes as they are."""

    function: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, blob: torch.Tensor) -> torch.Tensor:
        return blob  # hosts that fetch weights ahead call it there as well

    def move_to(self, device: torch.device) -> int:
        move = getattr(self.function, "move_to", None)
        return 0 if move is None else move(device=device)


def beside(layer: Layer, function: Any) -> BesideWeight:
    """`function` for the host to hold; LoraError where it was made for the vector of bytes."""
    difference = getattr(function, "bias", None)  # what the host makes for a weight of one dimension
    if isinstance(difference, torch.Tensor) and difference.shape == layer.blob.shape:
        raise LoraError(
            "this ComfyUI takes a 4-bit layer for a vector of bytes and would train those: its TrainLora is newer than "
            "this pack. Train on the 16-bit model; the LoRA loads here too"
        )
    return BesideWeight(function)


def forward(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """layer(x) + x @ (f(W) - W).T of the functions in the layer's weight_function."""
    if torch.is_autocast_enabled(x.device.type):  # as ComfyUI's own linear layers do
        x = x.to(torch.get_autocast_dtype(x.device.type))
    held, layer.weight_function = layer.weight_function, []  # a host that sees one copies the bytes for it
    try:
        y = layer.forward_comfy_cast_weights(x)
    finally:
        layer.weight_function = held
    functions: list[Any] = [each.function if isinstance(each, BesideWeight) else each for each in held]
    if not all(map(_thin, functions)):
        return y + linear(x, _change(layer, x.device, functions).to(x.dtype))
    for lora in functions:
        down, up = lora.lora_down.weight, lora.lora_up.weight
        y = y + linear(linear(x, down.to(x)), up.to(x)) * (lora.alpha / lora.rank).to(x)
    return y


def _thin(function: Any) -> bool:
    return type(function) is LORA and function.lora_mid is None


def _change(layer: Layer, device: torch.device, functions: Sequence[Any]) -> torch.Tensor:
    """f(W) - W, (N, K) float32"""
    with torch.no_grad():
        weight = layer.four_bit.layer(layer.blob.to(device)).dense_weight()
        if layer.loras is not None:
            weight = layer.loras.dense_weight(weight)
    changed = weight
    for function in functions:
        changed = function(changed)
    return changed - weight
