"""A whole layer around the asynchronous int8 kernel: activations int8 per row, the weight expanded to int8 rows."""

from collections.abc import Callable, Mapping

import torch

from ...layer import Layer
from . import verify
from .branch import side_by_side
from .int8_async import int8_gemm, tiling_of

Steps = Mapping[str, Callable]  # quantize_activation and expand_weight, see kernels/stages.py


def int8_linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: tuple[torch.Tensor, torch.Tensor] | None,
    steps: Steps,
) -> torch.Tensor:
    """One layer on x (M, K), w4a8-jit; torch's allocator hands out the same scratch memory to every call's weight."""
    spec = layer.spec
    proj_down = layer["proj_down"] if spec.rank else None
    a8, a_scale, act = steps["quantize_activation"](
        x, layer["smooth_factor"], proj_down, "int8_row", spec.act_unsigned, spec.act_rule
    )
    w8, w_scale = steps["expand_weight"](layer.tensors, spec.format, torch.int8)
    pairs = [(act, layer["proj_up"])] if spec.rank else []
    if lora is not None:
        pairs.append((x @ lora[0].to(x.dtype), lora[1]))
    return linear_w8a8(a8, a_scale, w8, w_scale, *side_by_side(pairs, x.dtype), bias, "", x.dtype)


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
    """The step of the same name in kernels/stages.py, by this kernel."""
    from ...stages import activate

    if proj_up is not None:
        branch_act, proj_up = side_by_side([(branch_act, proj_up)], dtype)
    n = weight.shape[0]
    branch = proj_up is not None
    verify.once(
        (qact.device, dtype, tiling_of(n), branch, None if bias is None else bias.dtype),
        lambda: check(qact.device, dtype, n, branch, None if bias is None else bias.dtype),
    )
    out = qact.new_empty(qact.shape[0], n, dtype=dtype)
    return activate(int8_gemm(qact, ascales, weight, row_scales, branch_act, proj_up, bias, out), activation)


def check(
    device: torch.device, dtype: torch.dtype, n: int, branch: bool, bias_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel, exact) for a small product with the tiling that N = n has: ragged rows and depth, several tiles."""
    draw = verify.numbers(device, 0)
    m, k, columns = 300, 784, 2 * tiling_of(n).columns
    a8, w8 = (draw(-127, 128, rows, k, dtype=torch.int8) for rows in (m, columns))
    a_scale, w_scale = (draw(0.01, 0.02, rows, dtype=torch.float32) for rows in (m, columns))
    act, up = (draw(-1, 1, rows, 48, dtype=dtype) if branch else None for rows in (m, columns))
    bias = None if bias_dtype is None else draw(-9, 9, columns, dtype=bias_dtype)
    out = int8_gemm(a8, a_scale, w8, w_scale, act, up, bias, a8.new_empty(m, columns, dtype=dtype))
    wanted = (a8.double() @ w8.double().T) * a_scale[:, None] * w_scale
    if branch:
        wanted += act.double() @ up.double().T
    return out, wanted if bias is None else wanted + bias
