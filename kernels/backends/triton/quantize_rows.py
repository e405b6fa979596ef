"""int8: code = round(y / scale), scale = absmax(y of a row) / 127;  fp8: code = e4m3(y / scale), scale = absmax / 448

y = (x + shift) / smooth_factor. What else is made of x, act, is said in down.py.
"""

import triton
import triton.language as tl

from .codes import GELU_SHIFT, extreme_or_nan, magnitude_bits, reciprocal, round_bits, smoothing
from .down import add_columns, down_of, make_columns, row_of, store_columns


@triton.jit
def smoothed(
    v,
    smooth_factor,
    k,
    K,
    unsigned_start,
    unsigned_stop,
    SMOOTH: tl.constexpr,
    ASM: tl.constexpr,
):
    """(x + shift) / smooth_factor of one tile, fp32"""
    y = v.to(tl.float32)
    if unsigned_start < unsigned_stop:  # the same for all programs; the other layers pay nothing
        y += tl.where((k >= unsigned_start) & (k < unsigned_stop), GELU_SHIFT, 0.0)[None, :]
    if SMOOTH:
        y = y * smoothing(smooth_factor, k, k < K, ASM)[None, :]
    return y


@triton.jit(do_not_specialize=["M", "unsigned_start", "unsigned_stop", "blocks"])
def quantize_rows(
    x,
    smooth_factor,
    proj_down,
    lora_down,
    strength,
    qact,
    ascales,
    act,
    M,
    K,
    R,
    R_LORA,
    width,
    stride_x,
    unsigned_start,
    unsigned_stop,
    blocks,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SMOOTH: tl.constexpr,
    FP8: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: BM rows, twice over K; the second time they are still in the cache. qact (M, K)

    Or some columns of act, for the first `blocks`
    """
    if COLUMNS:  # known when it is compiled
        tile, block = tl.program_id(0), tl.program_id(1)
        if block < blocks:
            make_columns(
                x, proj_down, lora_down, strength, act, tile, block, M, K, R, R_LORA, width, stride_x, BM, COLUMNS
            )
            return
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (rm < M)[:, None]
    rows = rm[:, None].to(tl.int64)
    kk = tl.arange(0, BK)
    largest = tl.zeros((BM,), tl.int32)
    if RANK:
        column = tl.arange(0, RANK)
        acc = tl.zeros((BM, RANK), tl.float32)
        down = down_of(proj_down, lora_down, kk, column, R, R_LORA)
        row = row_of(column, R, R_LORA)
    for start in range(0, K, BK):
        k = start + kk
        v = tl.load(x + rows * stride_x + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        if RANK:
            acc = add_columns(acc, v, down, k, K, column, R + R_LORA, False)
            down += row * BK
        y = smoothed(v, smooth_factor, k, K, unsigned_start, unsigned_stop, SMOOTH, ASM)
        largest = tl.maximum(largest, tl.max(magnitude_bits(y), axis=1))
    scale = extreme_or_nan(largest) / (448.0 if FP8 else 127.0)
    factor = reciprocal(scale)
    tl.store(ascales + rm, scale, mask=rm < M)
    if RANK:
        store_columns(act, acc, strength, rows, inside, column, R, R_LORA, width)
    for start in range(0, K, BK):
        k = start + kk
        valid = inside & (k < K)[None, :]
        v = tl.load(x + rows * stride_x + k[None, :], mask=valid, other=0.0)
        y = smoothed(v, smooth_factor, k, K, unsigned_start, unsigned_stop, SMOOTH, ASM) * factor[:, None]
        # the reciprocal may be one ulp too large, and fp8 has no room above 448
        code = tl.minimum(tl.maximum(y, -448.0), 448.0).to(tl.float8e4nv) if FP8 else round_bits(y).to(tl.int8)
        tl.store(qact + rows * K + k[None, :], code, mask=valid)
