"""y[m, n] = act(sum over groups g of ascales[g, m] * wscales[g, n] * (qact[m] . qweight[n] over g) + ...)

4-bit weights on int8 tensor cores, activations in 4 or 8 bit; the dots stand for epilogue.py. Nibbles are used 16 times
too large, as a shift is all it then takes to sign-extend them; the scales take that back exactly.
"""

import triton
import triton.language as tl

from .codes import (
    GELU_SHIFT,
    MAGIC,
    MAGIC_BITS,
    extreme_or_nan,
    high_nibbles,
    high_nibbles_unsigned,
    low_nibbles,
    low_nibbles_unsigned,
    magnitude_bits,
    reciprocal,
    round_bits,
)
from .epilogue import finish, store, tile_of


@triton.jit
def int_dot(low, high, weight_low, weight_high, BM: tl.constexpr, BN: tl.constexpr):
    """MAGIC + the integer dot product, as fp32: the sum starts at MAGIC's bits, so no integer is ever converted"""
    d = tl.dot(low, weight_low, tl.full((BM, BN), MAGIC_BITS, tl.int32), out_dtype=tl.int32)
    d = tl.dot(high, weight_high, d, out_dtype=tl.int32)
    return d.to(tl.float32, bitcast=True)


@triton.jit
def group_product(acc, d, sa, sw, BM: tl.constexpr, BN: tl.constexpr, FOLD: tl.constexpr):
    """acc + (d - MAGIC) * sa * sw; FOLD does it in two fused steps, exact when MAGIC * sa needs no rounding"""
    # fma(d, sa, -MAGIC * sa) = (d - MAGIC) * sa: two instructions an element instead of three. MAGIC has two
    # significant bits, so MAGIC * sa is exact if sa has at most 22, and all that is rounded is the product
    if FOLD:
        left = tl.broadcast_to(sa[:, None], (BM, BN))
        start = tl.broadcast_to((sa * -MAGIC)[:, None], (BM, BN))
        return tl.fma(tl.fma(d, left, start), tl.broadcast_to(sw[None, :], (BM, BN)), acc)
    else:
        return acc + (d - MAGIC) * (sa[:, None] * sw[None, :])


@triton.jit
def from_pairs(word, KIND: tl.constexpr, BN: tl.constexpr):
    """The BN 16-bit numbers in BN / 2 words, fp32"""
    first = word.to(tl.int16).to(KIND, bitcast=True)
    second = (word >> 16).to(tl.int16).to(KIND, bitcast=True)
    return tl.reshape(tl.join(first, second), (BN,)).to(tl.float32)


@triton.jit
def requantize(h, smooth_factor, rn, BM: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr):
    """Unsigned int4 codes of (h + shift) / smooth_factor for the next layer: bytes (BM, BN/64, 32), scales"""
    y = h.to(KIND).to(tl.float32) + GELU_SHIFT  # from the 16-bit output, as if the next layer had read it
    y = y * (1.0 / tl.load(smooth_factor + rn).to(tl.float32))[None, :]
    y = tl.reshape(y.to(KIND).to(tl.float32), (BM, BN // 64, 64))
    y = tl.where(y < 0.0, 0.0, y)
    scale = extreme_or_nan(tl.max(magnitude_bits(y), axis=2)) / 15.0
    bits = round_bits(y * reciprocal(scale)[:, :, None])
    even, odd = tl.split(tl.reshape(bits, (BM, BN // 64, 32, 2)))
    return ((even & 15) | (odd << 4)).to(tl.int8), scale


@triton.jit(do_not_specialize=["M", "biased", "unsigned_start", "unsigned_stop"])
def gemm_w4(
    qact,
    qweight,
    ascales,
    wscales,
    act,
    proj_up,
    lora_up,
    bias,
    out,
    next_smooth,
    next_qact,
    next_ascales,
    M,
    N,
    K,
    R,
    R_LORA,
    biased,
    unsigned_start,
    unsigned_stop,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GM: tl.constexpr,
    SLICE: tl.constexpr,
    EIGHT: tl.constexpr,
    FOLD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: one (BM, BN) tile of y. qact as quantize_groups leaves it, qweight (N, K/2), wscales (K/64, N)

    PAIRS: N is even, and two 16-bit wscales are a word: single ones could not be copied asynchronously
    REQUANTIZE writes next_qact (M, N/2) and next_ascales (N/64, M) beside y, for a next layer that takes unsigned codes
    """
    pm, pn = tile_of(tl.program_id(0), M, N, BM, BN, GM)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    rows = tl.where(rm < M, rm, 0)  # loads need no mask, stores have one
    columns = tl.where(rn < N, rn, 0)
    half = tl.arange(0, 32)
    STEP: tl.constexpr = 64 if EIGHT else 32  # bytes of activation per row and group
    act_row = K if EIGHT else K // 2
    ap = qact + rows[:, None].to(tl.int64) * act_row + half[None, :]
    wp = qweight + columns[None, :].to(tl.int64) * (K // 2) + half[:, None]
    sap = ascales + rows
    WORDS: tl.constexpr = PAIRS and wscales.dtype.element_ty.primitive_bitwidth == 16
    if WORDS:
        words = pn * (BN // 2) + tl.arange(0, BN // 2)
        swp = wscales.to(tl.pointer_type(tl.int32)) + words
    else:
        swp = wscales + columns
    acc = tl.zeros((BM, BN), tl.float32)
    for g in range(0, K // 64):
        w = tl.load(wp)
        sa = tl.load(sap).to(tl.float32)
        if WORDS:
            sw = from_pairs(tl.load(swp, mask=words < N // 2, other=0), wscales.dtype.element_ty, BN)
        else:
            sw = tl.load(swp).to(tl.float32)
        if EIGHT:
            low = tl.load(ap)
            high = tl.load(ap + 32)
        else:
            a = tl.load(ap)
            unsigned = (g * 64 >= unsigned_start) & (g * 64 < unsigned_stop)
            if unsigned:
                low = low_nibbles_unsigned(a, ASM)
                high = high_nibbles_unsigned(a, ASM)
                sa = sa * 16.0
            else:
                low = low_nibbles(a, ASM)
                high = high_nibbles(a, ASM)
        d = int_dot(low, high, low_nibbles(w, ASM), high_nibbles(w, ASM), BM, BN)
        acc = group_product(acc, d, sa, sw, BM, BN, FOLD)
        ap += STEP
        wp += 32
        sap += M
        swp += N // 2 if WORDS else N
    acc *= 0.0625 if EIGHT else 0.00390625
    acc = finish(
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
        SLICE,
        ACTIVATION,
    )
    store(out, acc, rm, rn, M, N)
    if REQUANTIZE:
        codes, scale = requantize(acc, next_smooth, columns, BM, BN, out.dtype.element_ty)
        group = pn * (BN // 64) + tl.arange(0, BN // 64)
        inside = (rm < M)[:, None] & (group < N // 64)[None, :]
        target = next_qact + rm[:, None, None].to(tl.int64) * (N // 2)
        target += group[None, :, None] * 32 + half[None, None, :]
        tl.store(target, codes, mask=inside[:, :, None])
        target = next_ascales + group[None, :].to(tl.int64) * M + rm[:, None]
        tl.store(target, scale.to(next_ascales.dtype.element_ty), mask=inside)
