"""int8: code = round(y / scale), scale = absmax(y of a row) / 127;  fp8: code = e4m3(y / scale), scale = absmax / 448

y = (x + shift) / smooth_factor, and in the same pass branch_act = x @ proj_down.
"""

import triton
import triton.language as tl

from .codes import GELU_SHIFT, extreme_or_nan, magnitude_bits, reciprocal, round_bits, smoothing


@triton.jit
def smoothed(
    v,
    smooth_factor,
    k,
    K,
    unsigned_start,
    unsigned_stop,
    SMOOTH: tl.constexpr,
    UNSIGNED: tl.constexpr,
    ASM: tl.constexpr,
):
    """(x + shift) / smooth_factor of one tile, fp32"""
    y = v.to(tl.float32)
    if UNSIGNED:
        y += tl.where((k >= unsigned_start) & (k < unsigned_stop), GELU_SHIFT, 0.0)[None, :]
    if SMOOTH:
        y = y * smoothing(smooth_factor, k, k < K, ASM)[None, :]
    return y


@triton.jit(do_not_specialize=["M", "unsigned_start", "unsigned_stop"])
def quantize_rows(
    x,
    smooth_factor,
    proj_down,
    qact,
    ascales,
    branch_act,
    M,
    K,
    R,
    stride_x,
    unsigned_start,
    unsigned_stop,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
    SMOOTH: tl.constexpr,
    FP8: tl.constexpr,
    UNSIGNED: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: BM rows, twice over K; the second time they are still in the cache. qact (M, K)"""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (rm < M)[:, None]
    rows = rm[:, None].to(tl.int64)
    kk = tl.arange(0, BK)
    largest = tl.zeros((BM,), tl.int32)
    if RANK:
        rr = tl.arange(0, RANK)
        acc = tl.zeros((BM, RANK), tl.float32)
    for start in range(0, K, BK):
        k = start + kk
        v = tl.load(x + rows * stride_x + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        if RANK:
            valid = (k < K)[:, None] & (rr < R)[None, :]
            down = tl.load(proj_down + k[:, None] * R + rr[None, :], mask=valid, other=0.0)
            acc = tl.dot(v, down.to(v.dtype), acc, input_precision="ieee")
        y = smoothed(v, smooth_factor, k, K, unsigned_start, unsigned_stop, SMOOTH, UNSIGNED, ASM)
        largest = tl.maximum(largest, tl.max(magnitude_bits(y), axis=1))
    scale = extreme_or_nan(largest) / (448.0 if FP8 else 127.0)
    factor = reciprocal(scale)
    tl.store(ascales + rm, scale, mask=rm < M)
    if RANK:
        target = branch_act + rows * R + rr[None, :]
        tl.store(target, acc.to(branch_act.dtype.element_ty), mask=inside & (rr < R)[None, :])
    for start in range(0, K, BK):
        k = start + kk
        valid = inside & (k < K)[None, :]
        v = tl.load(x + rows * stride_x + k[None, :], mask=valid, other=0.0)
        y = smoothed(v, smooth_factor, k, K, unsigned_start, unsigned_stop, SMOOTH, UNSIGNED, ASM) * factor[:, None]
        # the reciprocal may be one ulp too large, and fp8 has no room above 448
        code = tl.minimum(tl.maximum(y, -448.0), 448.0).to(tl.float8e4nv) if FP8 else round_bits(y).to(tl.int8)
        tl.store(qact + rows * K + k[None, :], code, mask=valid)
