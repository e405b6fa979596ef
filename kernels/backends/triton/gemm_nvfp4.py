"""y[m, n] = act(channel_scales[n] * sum over k of decode(qact)[m, k] * decode(qweight)[n, k] + ...), NVFP4 tensor cores

The dots stand for epilogue.py. Only sm_100 and sm_120 have the instruction.
"""

import triton
import triton.language as tl

from .epilogue import finish, store, tile_of

E2M1 = tl.constexpr("e2m1")  # a name, because the interpreter of triton 3.6 takes no bare string here


@triton.jit(do_not_specialize=["M", "biased"])
def gemm_nvfp4(
    qact,
    qweight,
    ascales,
    wscales,
    channel_scales,
    act,
    proj_up,
    lora_up,
    bias,
    out,
    M,
    N,
    half,
    R,
    R_LORA,
    biased,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GM: tl.constexpr,
    SLICE: tl.constexpr,
    EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One program: one (BM, BN) tile of y. qact (M, K/2), qweight (N, K/2), ascales (W, M, 4), wscales (N, W, 4)

    half = K/2, W = ceil(K/64): the scales of four groups are one word and copied as one, as single bytes cannot be
    copied asynchronously. What a word has beyond K is zero
    """
    pm, pn = tile_of(tl.program_id(0), M, N, BM, BN, GM)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    rows = tl.where(rm < M, rm, 0)
    columns = tl.where(rn < N, rn, 0)
    kb = tl.arange(0, BK // 2)
    kg = tl.arange(0, BK // 16)
    words = tl.cdiv(half, 32)
    ap = qact + rows[:, None].to(tl.int64) * half + kb[None, :]
    wp = qweight + columns[None, :].to(tl.int64) * half + kb[:, None]
    sap = ascales + (kg // 4)[None, :].to(tl.int64) * (4 * M) + (4 * rows)[:, None] + (kg % 4)[None, :]
    swp = wscales + columns[:, None].to(tl.int64) * (4 * words) + kg[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, tl.cdiv(half, BK // 2)):
        if EVEN:
            a = tl.load(ap)
            w = tl.load(wp)
            sa = tl.load(sap)
            sw = tl.load(swp)
        else:
            bytes_left = k * (BK // 2) + kb < half
            groups_left = (k * (BK // 64) + kg // 4 < words)[None, :]
            a = tl.load(ap, mask=bytes_left[None, :], other=0)
            w = tl.load(wp, mask=bytes_left[:, None], other=0)
            sa = tl.load(sap, mask=groups_left, other=0.0)
            sw = tl.load(swp, mask=groups_left, other=0.0)
        acc = tl.dot_scaled(a, sa, E2M1, w, sw, E2M1, acc)
        ap += BK // 2
        wp += BK // 2
        sap += M * (BK // 16)
        swp += BK // 16
    acc *= tl.load(channel_scales + columns)[None, :]
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
