"""What every matrix product ends with: low-rank branch, the user's LoRA, bias, activation function.

y = activation(acc + act @ [proj_up | lora_up].T + bias), act as down.py makes it
"""

import triton
import triton.language as tl

from .codes import gelu, silu


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GM: tl.constexpr):
    """Row and column of tile `pid`: GM row tiles share a column of weights while it is in the cache"""
    rows = tl.cdiv(M, BM)
    columns = tl.cdiv(N, BN)
    first = pid // (GM * columns) * GM
    height = min(rows - first, GM)
    inside = pid % (GM * columns)
    return first + inside % height, inside // height


@triton.jit
def add_low_rank(acc, act, up, rows, columns, R, width, SLICE: tl.constexpr):
    """acc + act[:, :R] @ up.T, SLICE columns of act at a time; act (M, width), up (N, R)"""
    for start in tl.range(0, R, SLICE, num_stages=1):
        rr = start + tl.arange(0, SLICE)
        inside = rr < R
        left = tl.load(act + rows[:, None].to(tl.int64) * width + rr[None, :], mask=inside[None, :], other=0.0)
        right = tl.load(up + columns[None, :].to(tl.int64) * R + rr[:, None], mask=inside[:, None], other=0.0)
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def finish(
    acc,
    act,
    proj_up,
    lora_up,
    bias,
    rows,
    columns,
    R,
    R_LORA,
    biased,
    SLICE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The formula of this module on one tile; `rows` and `columns` lie inside the matrix

    R, R_LORA and `biased` (N, or 0 without a bias) may be 0: a layer with a LoRA, or without a bias, is no other kernel
    """
    acc = add_low_rank(acc, act, proj_up, rows, columns, R, R + R_LORA, SLICE)
    acc = add_low_rank(acc, act + R, lora_up, rows, columns, R_LORA, R + R_LORA, SLICE)
    acc += tl.load(bias + columns, mask=columns < biased, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == 1:
        acc = gelu(acc)
    elif ACTIVATION == 2:
        acc = silu(acc)
    return acc


@triton.jit
def store(out, acc, rm, rn, M, N):
    """out[rm, rn] = acc where inside"""
    target = out + rm[:, None].to(tl.int64) * N + rn[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])
