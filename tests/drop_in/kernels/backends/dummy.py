"""A kernel backend in one file: it claims the layers of one kind of code on a CPU, more than any other backend.

It computes what the reference does, in another order: group after group, in float64.
"""

import torch

from .. import stages
from ..layer import Layer, Lora
from . import Backend, KernelCall, each_call

CODE = "uneven levels"
CLAIM = 1000


def claims(call: KernelCall) -> int | str:
    """How much it wants a call, or why it cannot run it."""
    if call.fmt.code != CODE:
        return f"knows {CODE}, not {call.fmt.code}"
    if call.device.type != "cpu":
        return f"runs on a CPU, this is {call.device.type}"
    return CLAIM if call.compute == "w4a4" else f"has no {call.compute}"


def linear(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, compute: str) -> torch.Tensor:
    """y = sum over groups of Q(x / smooth) @ W.T, + (x @ proj_down) @ proj_up.T + bias; x (M, K) -> (M, N)"""
    spec, size = layer.spec, layer.spec.fmt.group_size
    act = stages.smoothed(x, layer["smooth_factor"], spec.act_unsigned, layer.tensors.get("act_mean")).to(x.dtype)
    codes, scales = spec.fmt.quantize_activation(act, rule=spec.act_rule)
    levels, weight = spec.fmt.decode_activation(codes, scales).double(), layer.decode_weight().double()
    y = x.new_zeros(x.shape[0], spec.n, dtype=torch.float64)
    for start in range(0, spec.k, size):
        y += levels[:, start : start + size] @ weight[:, start : start + size].T
    branches = [(layer["proj_down"], layer["proj_up"])] if spec.rank else []
    for down, up in [*branches, *([] if lora is None else [(lora.down, lora.up)])]:
        y += x.double() @ down.double() @ up.double().T
    bias = layer.centred_bias(bias)
    return (y if bias is None else y + bias.double()).to(x.dtype)


BACKEND = Backend("dummy", claims, each_call(linear))
