"""The steps of kernels/stages.py by these kernels, argument for argument."""

import torch

from . import launch
from .launch import Branches, Range

Tensors = dict[str, torch.Tensor]


def quantize_activation(
    x: torch.Tensor,
    smooth_factor: torch.Tensor | None,
    proj_down: torch.Tensor | None,
    codes: str,
    act_unsigned: Range,
    act_rule: str = "absmax",
    act_mean: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return launch.quantize(x, smooth_factor, proj_down, codes, act_unsigned, act_rule, act_mean)


def linear_w4(
    qact: torch.Tensor,
    ascales: torch.Tensor,
    weights: Tensors,
    branch_act: torch.Tensor | None,
    proj_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    act_unsigned: Range,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    branches = Branches(branch_act, proj_up, bias=bias, activation=activation)
    qweight, wscales = weights["qweight"], weights["wscales"]
    if format == "nvfp4":
        scales = launch.channel_scales_of(weights)
        return launch.multiply_nvfp4(qact, ascales, qweight, wscales, scales, branches, dtype)
    return launch.multiply_w4(qact, ascales, qweight, wscales, branches, act_unsigned, dtype)[0]


def linear_w4_requantize(
    qact: torch.Tensor,
    ascales: torch.Tensor,
    weights: Tensors,
    branch_act: torch.Tensor | None,
    proj_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    next_smooth: torch.Tensor,
    act_unsigned: Range,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    branches = Branches(branch_act, proj_up, bias=bias, activation="gelu")
    qweight, wscales = weights["qweight"], weights["wscales"]
    return launch.multiply_w4(qact, ascales, qweight, wscales, branches, act_unsigned, dtype, next_smooth)


def expand_weight(weights: Tensors, format: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return launch.expand(format, weights, dtype, launch.channel_scales_of(weights))


def linear_w8a8(
    qact: torch.Tensor,
    ascales: torch.Tensor,
    weight: torch.Tensor,
    row_scales: torch.Tensor,
    branch_act: torch.Tensor | None,
    proj_up: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    branches = Branches(branch_act, proj_up, bias=bias, activation=activation)
    return launch.multiply_w8(qact, ascales, weight, row_scales, branches, dtype)


def gemv_w4a16(x: torch.Tensor, weights: Tensors, bias: torch.Tensor | None) -> torch.Tensor:
    return launch.multiply_gemv(x, weights["qweight"], weights["wscales"], weights["wzeros"], bias)
