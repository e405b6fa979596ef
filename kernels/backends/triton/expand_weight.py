"""int8: code = round(w / s), s = largest |group scale| of a row / UNIT;  fp8: e4m3(w / s);  16 bit: w / smooth_factor

w is the decoded 4-bit weight: int4, awq, or nvfp4 without the scales above its groups, which go into row_scales. The
row scale needs no look at the codes, so expansion is one pass that keeps no state and always gives the same bytes.
"""

import triton
import triton.language as tl

from .codes import GELU_SHIFT, from_e2m1, from_e4m3, interleave, round_bits


@triton.jit
def group_scales(wscales, group, rn, stride_g, stride_n, inside, NVFP4: tl.constexpr):
    """(BN, groups) fp32"""
    places = group[None, :].to(tl.int64) * stride_g + rn[:, None].to(tl.int64) * stride_n
    found = tl.load(wscales + places, mask=inside, other=0)
    if NVFP4:
        return from_e4m3(found.to(tl.int32))
    else:
        return found.to(tl.float32)


@triton.jit
def largest_scale(wscales, rn, N, K, stride_g, stride_n, BN: tl.constexpr, GROUPS: tl.constexpr, NVFP4: tl.constexpr):
    """Largest |group scale| of each row; the scales are 1/8 of the bytes at most"""
    GROUP: tl.constexpr = 16 if NVFP4 else 64
    largest = tl.zeros((BN,), tl.float32)
    for first in range(0, K // GROUP, GROUPS):
        group = first + tl.arange(0, GROUPS)
        inside = (rn < N)[:, None] & (group < K // GROUP)[None, :]
        found = group_scales(wscales, group, rn, stride_g, stride_n, inside, NVFP4)
        largest = tl.maximum(largest, tl.max(tl.abs(found), axis=1))
    return largest


@triton.jit
def codes_of(b, NVFP4: tl.constexpr, AWQ: tl.constexpr):
    """Values of the low nibbles of int32 bytes, fp32"""
    if NVFP4:
        return from_e2m1(b)
    elif AWQ:
        return (b & 15).to(tl.float32) - 8.0
    else:
        return ((b << 28) >> 28).to(tl.float32)


@triton.jit
def expand_weight(
    qweight,
    wscales,
    wzeros,
    channel_scales,
    smooth_factor,
    weight,
    row_scales,
    shift,
    N,
    K,
    stride_g,
    stride_n,
    unsigned_start,
    unsigned_stop,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    NVFP4: tl.constexpr,
    AWQ: tl.constexpr,
    UNIT: tl.constexpr,
    CHANNEL: tl.constexpr,
    SMOOTH: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """One program: BN whole rows. weight (N, K) int8 or fp8 with UNIT, 16 bit without; wscales of any strides

    row_scales (N,) fp32 with UNIT; else SHIFT writes shift (N,) fp32 = GELU_SHIFT * sum of w / smooth_factor over the
    unsigned channels, which a layer that does not shift its activations owes its bias
    """
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = rn[:, None].to(tl.int64)
    GROUP: tl.constexpr = 16 if NVFP4 else 64
    WIDTH: tl.constexpr = GROUPS * GROUP
    upper = tl.full((BN,), 1.0, tl.float32)
    if CHANNEL:
        upper = tl.load(channel_scales + rn, mask=rn < N, other=1.0)
    if UNIT:
        largest = largest_scale(wscales, rn, N, K, stride_g, stride_n, BN, GROUPS, NVFP4)
        unit = tl.full((BN,), UNIT, tl.float32)
        factor = tl.where(largest == 0.0, 0.0, tl.div_rn(unit, tl.where(largest == 0.0, 1.0, largest)))
        tl.store(row_scales + rn, tl.div_rn(largest, unit) * upper, mask=rn < N)
    else:
        factor = upper
    total = tl.zeros((BN,), tl.float32)
    for first in range(0, K // GROUP, GROUPS):
        kb = first * (GROUP // 2) + tl.arange(0, WIDTH // 2)
        k = first * GROUP + tl.arange(0, WIDTH)
        group = first + tl.arange(0, GROUPS)
        inside = (rn < N)[:, None]
        b = tl.load(qweight + rows * (K // 2) + kb[None, :], mask=inside & (kb < K // 2)[None, :], other=0)
        b = tl.reshape(b.to(tl.int32), (BN, GROUPS, GROUP // 2))
        valid = inside & (group < K // GROUP)[None, :]
        scale = (group_scales(wscales, group, rn, stride_g, stride_n, valid, NVFP4) * factor[:, None])[:, :, None]
        low = codes_of(b, NVFP4, AWQ) * scale
        high = codes_of(b >> 4, NVFP4, AWQ) * scale
        if AWQ:
            zero = group_scales(wzeros, group, rn, stride_g, stride_n, valid, False)[:, :, None]
            low += zero
            high += zero
        even = tl.reshape(low, (BN, WIDTH // 2))
        odd = tl.reshape(high, (BN, WIDTH // 2))
        w = interleave(even, odd, BN, WIDTH)
        if SMOOTH:
            w = w * (1.0 / tl.load(smooth_factor + k, mask=k < K, other=1.0).to(tl.float32))[None, :]
        if SHIFT:
            total += tl.sum(tl.where(((k >= unsigned_start) & (k < unsigned_stop))[None, :], w, 0.0), axis=1)
        target = weight + rows * K + k[None, :]
        if weight.dtype.element_ty == tl.int8:
            tl.store(target, round_bits(w).to(tl.int8), mask=inside & (k < K)[None, :])
        else:
            tl.store(target, w.to(weight.dtype.element_ty), mask=inside & (k < K)[None, :])
    if SHIFT:
        tl.store(shift + rn, total * GELU_SHIFT, mask=rn < N)
