"""int4: code = round(y / scale), scale = absmax(y of 64 channels) / 7 or max / 15;  int8: scale = absmax / 127

SIGNED_EXTREME: scale of signed int4 groups = -(element of largest magnitude) / 8.
y = (x - act_mean + shift) / smooth_factor. What else is made of x, act, is said in down.py.
"""

import triton
import triton.language as tl

from .codes import (
    GELU_SHIFT,
    extreme_or_nan,
    magnitude_bits,
    pairs,
    reciprocal,
    round_bits,
    round_up_12_bits,
    smoothing,
)
from .down import add_columns, down_of, make_columns, row_of, store_columns


@triton.jit
def encode_group(y, unsigned, KIND: tl.constexpr, EIGHT: tl.constexpr, SIGNED_EXTREME: tl.constexpr):
    """(round_bits of the codes, scale) along the last axis of y; rounded to KIND first where 4-bit codes follow"""
    top = 127.0 if EIGHT else tl.where(unsigned, 15.0, 7.0)
    if not EIGHT:
        y = y.to(KIND).to(tl.float32)  # the reference rounds the smoothed activation to the dtype of x
        y = tl.maximum(y, tl.where(unsigned, 0.0, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    bits = magnitude_bits(y)
    extreme_bits = tl.max(bits, axis=-1)
    extreme = extreme_or_nan(extreme_bits)
    scale = extreme / top
    if SIGNED_EXTREME:
        # the element of largest magnitude becomes code -8, so the scale has the opposite of its sign
        positive = tl.max(y.to(tl.int32, bitcast=True), axis=-1) == extreme_bits  # bits of negative floats are negative
        signed = tl.where(positive, -extreme, extreme) / 8.0
        scale = tl.where(unsigned, scale, signed)
    if EIGHT:
        scale = round_up_12_bits(scale)
    code = y * tl.expand_dims(reciprocal(scale), -1)
    if SIGNED_EXTREME:
        code = tl.minimum(code, top)
    return round_bits(code), scale


@triton.jit(do_not_specialize=["M", "unsigned_start", "unsigned_stop", "groups", "blocks"])
def quantize_groups(
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
    unsigned_start,
    unsigned_stop,
    groups,
    blocks,
    BM: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SMOOTH: tl.constexpr,
    MEAN: tl.constexpr,
    EIGHT: tl.constexpr,
    SIGNED_EXTREME: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: BM rows, `groups` groups of 64 channels; or some columns of act, see down.py, for the first `blocks`

    qact (M, K/2), low nibble = even column; or EIGHT: (M, K), in each group the even columns, then the odd ones, which
    is how the nibbles of a weight come apart
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
    first = (tl.program_id(1) - blocks) * groups
    last = min(first + groups, K // 64)
    if RANK:
        column = tl.arange(0, RANK)
        acc = tl.zeros((BM, RANK), tl.float32)
        down = down_of(proj_down, lora_down, first * 64 + kk, column, R, R_LORA)
        row = row_of(column, R, R_LORA)
    for g in range(first, last):
        k = g * 64 + kk
        v = tl.load(x + rows * stride_x + k[None, :], mask=inside, other=0.0)
        if RANK:
            acc = add_columns(acc, v, down, k, K, column, R + R_LORA, True)
            down += row * 64
        unsigned = (g * 64 >= unsigned_start) & (g * 64 < unsigned_stop)
        y = v.to(tl.float32)
        if MEAN:
            y -= tl.load(act_mean + k).to(tl.float32)[None, :]
        y += tl.where(unsigned, GELU_SHIFT, 0.0)  # a branch costs more than to add nothing
        if SMOOTH:
            y = y * smoothing(smooth_factor, k, True, ASM)[None, :]
        bits, scale = encode_group(y, unsigned, x.dtype.element_ty, EIGHT, SIGNED_EXTREME)
        even, odd = pairs(bits, BM, 64)
        if EIGHT:
            target = qact + rows * K + (g * 64 + half)[None, :]
            tl.store(target, even.to(tl.int8), mask=inside)
            tl.store(target + 32, odd.to(tl.int8), mask=inside)
        else:
            packed = (even & 15) | (odd << 4)
            tl.store(qact + rows * (K // 2) + (g * 32 + half)[None, :], packed.to(tl.int8), mask=inside)
        tl.store(ascales + g * M + rm, scale.to(ascales.dtype.element_ty), mask=rm < M)
    if RANK:
        store_columns(act, acc, strength, rows, inside, column, R, R_LORA, width)
