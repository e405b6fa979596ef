"""LAYER 1: tensors in, tensors out. The public operations; arguments are checked here, once.

`svdquant_linear` is a whole layer. The others are its steps, for callers that fuse more than one layer:

    quantize_activation   x -> codes, scales, x @ proj_down
    linear_w4a4           4-bit codes on both sides -> y
    linear_w4a8           4-bit weights, 8-bit activations -> y
    linear_w4_requantize  either of them -> GELU(y), and y in the codes that the next layer takes
    expand_weight         4-bit weight -> 8-bit weight with one scale per row
    linear_w8a8           8-bit codes on both sides -> y
    gemv_w4a16            awq_w4a16 weights, 16-bit activations -> y

The only library below this line is torch; a backend may bring its own.
"""

import torch

from . import check, ops
from .dispatch import COMPUTES, Choice, choose, computes_of
from .formats import FORMATS
from .layer import Layer, LayerError, LayerSpec

__all__ = [
    "COMPUTES",
    "FORMATS",
    "Choice",
    "Layer",
    "LayerError",
    "LayerSpec",
    "choose",
    "computes_of",
    "expand_weight",
    "gemv_w4a16",
    "linear_w4_requantize",
    "linear_w4a4",
    "linear_w4a8",
    "linear_w8a8",
    "quantize_activation",
    "svdquant_linear",
]


def svdquant_linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None = None,
    lora: tuple[torch.Tensor, torch.Tensor] | None = None,
    compute: str = "auto",
    *,
    lora_strength: torch.Tensor | None = None,
    activation: str = "",
) -> torch.Tensor:
    """y = Q(x / smooth_factor) @ decode(qweight).T + (x @ proj_down) @ proj_up.T + bias [+ (x @ lora_down) @ lora_up.T]

    A layer with act_mean and out_mean has x - act_mean in place of the first x, and + out_mean.

    x        (..., K) bf16, fp16, fp32 (or fp64, as an oracle); any leading dimensions, also empty, also strided
    layer    tensors on the device of x
    bias     (N,) or None
    lora     (lora_down (K, R'), lora_up (N, R')) or None: the user's LoRA, more columns of the same branch
    compute  w4a4 quantizes activations as well, w16 does not, auto takes the best one of kernels/modes.py that runs
    lora_strength  (ceil(R' / 16),) or None: a factor for each 16 columns of the LoRA
    activation     "", "gelu" (tanh form) or "silu", applied to y
    returns  (..., N) in the dtype of x; sums are kept in float32. NaN in a row of x gives NaN in that row of y
    raises   ValueError for a wrong dtype, device or shape, or when no backend can run the call
    """
    spec = layer.spec
    check.activation_input(x, spec.k, f"this {spec.format} layer")
    check.same_device("the layer", layer["qweight"], x)
    check.vector("bias", bias, spec.n, x)
    if lora is not None:
        check.lora(lora, lora_strength, spec.k, spec.n, x)
    check.one_of("activation", activation, check.ACTIVATIONS)
    down, up = lora if lora is not None else (None, None)
    y = ops.linear(
        x.reshape(-1, spec.k),
        *[layer.tensors.get(name) for name in ops.TENSORS],
        bias,
        down,
        up,
        lora_strength if lora is not None else None,
        spec.format,
        list(spec.act_unsigned),
        spec.act_rule,
        spec.act_bits,
        compute,
        activation,
    )
    return y.view(*x.shape[:-1], spec.n)


def quantize_activation(
    x: torch.Tensor,
    smooth_factor: torch.Tensor | None = None,
    proj_down: torch.Tensor | None = None,
    *,
    codes: str = "int4",
    act_unsigned: tuple[int, int] = (0, 0),
    act_rule: str = "absmax",
    act_mean: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qact = round((x - act_mean + shift) / smooth_factor / scale), branch_act = x @ proj_down

    x             (M, K) bf16, fp16 or fp32
    act_unsigned  channels that are shifted by GELU_SHIFT; int4 gives them unsigned codes
    codes         | qact                              | ascales
      int4        | (M, K/2) int8, low nibble = even  | (K/64, M) dtype of x, absmax / 7 or max / 15
      nvfp4       | (M, K/2) int8, low nibble = even  | (K/16, M) float8_e4m3fn, absmax / 6
      int8_group  | (M, K) int8, kernels/eight_bit.py | (K/64, M) float32, absmax / 127
      int8_row    | (M, K) int8                       | (M,) float32, absmax / 127
      fp8_row     | (M, K) float8_e4m3fn              | (M,) float32, absmax / 448
    act_mean      (K,) or None, for codes of 4 bit
    act_rule      absmax, or a rule of kernels/formats: signed_extreme for int4, four_six for nvfp4
    returns  qact, ascales, branch_act (M, R) in the dtype of x, R = 0 without proj_down. A group (row) with NaN or Inf
             has the scale NaN
    raises   ValueError for a wrong dtype, device or shape
    """
    check.one_of("codes", codes, tuple(ops.GROUP))
    check.one_of("act_rule", act_rule, FORMATS[codes].act_rules if codes in FORMATS else ("absmax",))
    check.matrix_input(x, codes, act_unsigned)
    check.vector("smooth_factor", smooth_factor, x.shape[1], x)
    check.matrix("proj_down", proj_down, (x.shape[1], None), x)
    check.vector("act_mean", act_mean, x.shape[1], x)
    if act_mean is not None and codes not in FORMATS:
        raise ValueError(f"act_mean is for codes of 4 bit, int4 and nvfp4, not for {codes}")
    return ops.quantize_activation(x, smooth_factor, proj_down, act_mean, codes, list(act_unsigned), act_rule)


def linear_w4a4(
    qact: torch.Tensor,
    ascales: torch.Tensor,
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    branch_act: torch.Tensor | None = None,
    proj_up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    format: str = "int4",
    wtscale: torch.Tensor | None = None,
    wcscales: torch.Tensor | None = None,
    act_unsigned: tuple[int, int] = (0, 0),
    activation: str = "",
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """y = act(decode(qact) @ decode(qweight).T + branch_act @ proj_up.T + bias)

    qact        (M, K/2) int8 and ascales as quantize_activation makes them with codes = format
    qweight     (N, K/2) int8, low nibble = even column; wscales, wtscale, wcscales see kernels/layer.py
    branch_act  (M, R), proj_up (N, R), both or none; bias (N,)
    returns     (M, N) in `dtype`; products accumulate in fp32
    raises      ValueError for a wrong dtype, device or shape
    """
    check.codes_and_weight(qact, qweight, 1)
    check.branch(branch_act, proj_up, bias, qact.shape[0], qweight.shape[0], qact)
    return ops.linear_w4(
        qact, ascales, qweight, wscales, wtscale, wcscales, branch_act, proj_up, bias, format, list(act_unsigned),
        activation, dtype,
    )  # fmt: skip


def linear_w4a8(
    qact: torch.Tensor,
    ascales: torch.Tensor,
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    branch_act: torch.Tensor | None = None,
    proj_up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "",
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """y = act(decode(qact) @ decode(qweight).T + branch_act @ proj_up.T + bias), int4 weights

    qact (M, K) int8 and ascales (K/64, M) as quantize_activation makes them with codes = int8_group; the rest as in
    linear_w4a4
    """
    check.codes_and_weight(qact, qweight, 2)
    check.branch(branch_act, proj_up, bias, qact.shape[0], qweight.shape[0], qact)
    return ops.linear_w4(
        qact, ascales, qweight, wscales, None, None, branch_act, proj_up, bias, "int4", [0, 0], activation, dtype
    )


def linear_w4_requantize(
    qact: torch.Tensor,
    ascales: torch.Tensor,
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    next_smooth: torch.Tensor,
    branch_act: torch.Tensor | None = None,
    proj_up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    act_unsigned: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = GELU(linear_w4a4 or linear_w4a8 of int4); next_qact = round((y + GELU_SHIFT) / next_smooth / scale)

    next_smooth  (N,) smooth_factor of the layer that reads y; N is its K, a multiple of 64
    returns      y (M, N) in `dtype` (its low-rank branch needs it), next_qact (M, N/2) and next_ascales (N/64, M): what
                 quantize_activation(y, next_smooth, act_unsigned=(0, N)) gives
    """
    check.codes_and_weight(qact, qweight, None)
    check.vector("next_smooth", next_smooth, qweight.shape[0], qact)
    if qweight.shape[0] % 64:
        raise ValueError(f"N={qweight.shape[0]} is not a multiple of the next layer's group of 64 input channels")
    check.branch(branch_act, proj_up, bias, qact.shape[0], qweight.shape[0], qact)
    return ops.linear_w4_requantize(
        qact, ascales, qweight, wscales, branch_act, proj_up, bias, next_smooth, list(act_unsigned), dtype
    )


def expand_weight(
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    wtscale: torch.Tensor | None = None,
    wcscales: torch.Tensor | None = None,
    *,
    format: str = "int4",
    dtype: torch.dtype = torch.int8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """decode(qweight)[n, k] = weight[n, k] * row_scales[n], nearly

    format   int4 or nvfp4
    dtype    of weight: int8, or float8_e4m3fn
    returns  weight (N, K), row_scales (N,) float32; the same bytes whenever and wherever it runs (int8)
    raises   ValueError for another format or dtype
    """
    check.one_of("format", format, ("int4", "nvfp4"))
    check.one_of("dtype", dtype, (torch.int8, torch.float8_e4m3fn))
    return ops.expand_weight(qweight, wscales, wtscale, wcscales, format, dtype)


def linear_w8a8(
    qact: torch.Tensor,
    ascales: torch.Tensor,
    weight: torch.Tensor,
    row_scales: torch.Tensor,
    branch_act: torch.Tensor | None = None,
    proj_up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "",
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """y = act((qact @ weight.T) * ascales[:, None] * row_scales + branch_act @ proj_up.T + bias)

    qact (M, K) int8, ascales (M,) float32: codes = int8_row; weight (N, K) int8, row_scales (N,): expand_weight.
    The integer sums are exact.
    """
    check.codes_and_weight(qact, weight, 1)
    check.branch(branch_act, proj_up, bias, qact.shape[0], weight.shape[0], qact)
    return ops.linear_w8a8(qact, ascales, weight, row_scales, branch_act, proj_up, bias, activation, dtype)


def gemv_w4a16(
    x: torch.Tensor,
    qweight: torch.Tensor,
    wscales: torch.Tensor,
    wzeros: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x @ ((code - 8) * wscales + wzeros).T + bias, for a few rows

    x (M, K) bf16, fp16 or fp32; qweight (N, K/2); wscales, wzeros (K/64, N). Returns (M, N) in the dtype of x.
    """
    check.matrix_input(x, "int8_group", (0, 0))
    check.codes_and_weight(x, qweight, 2)
    check.vector("bias", bias, qweight.shape[0], x)
    return ops.gemv_w4a16(x, qweight, wscales, wzeros, bias)
