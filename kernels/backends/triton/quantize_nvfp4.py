"""code = e2m1(y / scale), scale = min(absmax(y of 16 channels) / 6, 448), stored as E4M3

FOUR_SIX: or min(absmax / 4, 448), group by group whichever has the smaller squared error.
y = (x - act_mean) / smooth_factor. What else is made of x, act, is said in down.py.
"""

import triton
import triton.language as tl

from .codes import extreme_or_nan, magnitude_bits, reciprocal, smoothing, to_e2m1_pairs
from .down import add_columns, down_of, make_columns, row_of, store_columns


@triton.jit
def encode(y, extreme, top, BM: tl.constexpr, CONVERTS: tl.constexpr):
    """(bytes of two codes, unrounded scale, squared error of each group) with scale = min(extreme / top, 448)

    The error is that of the scale as it will be stored
    """
    scale = extreme / top
    scale = tl.where(scale > 448.0, 448.0, scale)  # a comparison keeps NaN, minimum() would drop it
    even, odd = tl.split(tl.reshape(y * reciprocal(scale)[:, :, None], (BM, 4, 8, 2)))
    packed, even, odd = to_e2m1_pairs(even, odd, CONVERTS)
    stored = scale.to(tl.float8e4nv).to(tl.float32)[:, :, None]
    difference = tl.reshape(tl.join(even, odd), (BM, 4, 16)) * stored - y
    return packed, scale, tl.sum(difference * difference, axis=2)


@triton.jit(do_not_specialize=["M", "steps", "blocks"])
def quantize_nvfp4(
    x,
    smooth_factor,
    act_mean,
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
    steps,
    blocks,
    BM: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SMOOTH: tl.constexpr,
    MEAN: tl.constexpr,
    FOUR_SIX: tl.constexpr,
    ASM: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """One program: BM rows, `steps` times 64 channels; or some columns of act, for the first `blocks`

    qact (M, K/2), ascales (ceil(K/64), M, 4) e4m3

    With CONVERTS the GPU has cvt to E2M1: the same codes, but in a group with NaN or Inf, whose scale is NaN either way
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
    kk = tl.arange(0, 64)
    half = tl.arange(0, 32)
    quarter = tl.arange(0, 4)
    first = (tl.program_id(1) - blocks) * steps
    last = min(first + steps, tl.cdiv(K, 64))
    if RANK:
        column = tl.arange(0, RANK)
        acc = tl.zeros((BM, RANK), tl.float32)
        down = down_of(proj_down, lora_down, first * 64 + kk, column, R, R_LORA)
        row = row_of(column, R, R_LORA)
    for step in range(first, last):
        k = step * 64 + kk
        v = tl.load(x + rows * stride_x + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        if RANK:
            acc = add_columns(acc, v, down, k, K, column, R + R_LORA, False)
            down += row * 64
        y = v.to(tl.float32)
        if MEAN:
            y -= tl.load(act_mean + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        if SMOOTH:
            y = y * smoothing(smooth_factor, k, k < K, ASM)[None, :]
        y = tl.reshape(y.to(x.dtype.element_ty).to(tl.float32), (BM, 4, 16))
        extreme = extreme_or_nan(tl.max(magnitude_bits(y), axis=2))
        packed, scale, error = encode(y, extreme, 6.0, BM, CONVERTS)
        if FOUR_SIX:
            other, other_scale, other_error = encode(y, extreme, 4.0, BM, CONVERTS)
            better = other_error < error
            packed = tl.where(better[:, :, None], other, packed)
            scale = tl.where(better, other_scale, scale)
        kb = step * 32 + half
        target = qact + rows * (K // 2) + kb[None, :]
        tl.store(target, tl.reshape(packed, (BM, 32)), mask=inside & (kb < K // 2)[None, :])
        target = ascales + 4 * (step * M + rows) + quarter[None, :]
        tl.store(target, scale.to(tl.float8e4nv), mask=inside)  # beyond K they are zero
    if RANK:
        store_columns(act, acc, strength, rows, inside, column, R, R_LORA, width)
