"""y[m, n] = act(ascales[m] * row_scales[n] * (qact[m] . weight[n]) + ...), int8; the dots stand for epilogue.py"""

import triton
import triton.language as tl

from .epilogue import finish, store, tile_of


@triton.jit(do_not_specialize=["M", "biased"])
def gemm_w8(
    qact,
    weight,
    ascales,
    row_scales,
    act,
    proj_up,
    lora_up,
    bias,
    out,
    M,
    N,
    K,
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
    """One program: one (BM, BN) tile of y. qact (M, K) and weight (N, K) in the same order of channels; EVEN: BK | K"""
    pm, pn = tile_of(tl.program_id(0), M, N, BM, BN, GM)
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    rows = tl.where(rm < M, rm, 0)  # loads need no mask, stores have one
    columns = tl.where(rn < N, rn, 0)
    kk = tl.arange(0, BK)
    ap = qact + rows[:, None].to(tl.int64) * K + kk[None, :]
    wp = weight + columns[None, :].to(tl.int64) * K + kk[:, None]
    total = tl.zeros((BM, BN), tl.int32)
    for k in range(0, tl.cdiv(K, BK)):
        if EVEN:
            a = tl.load(ap)
            w = tl.load(wp)
        else:
            inside = k * BK + kk < K
            a = tl.load(ap, mask=inside[None, :], other=0)
            w = tl.load(wp, mask=inside[:, None], other=0)
        total = tl.dot(a, w, total, out_dtype=tl.int32)
        ap += BK
        wp += BK
    acc = total.to(tl.float32) * tl.load(ascales + rows)[:, None] * tl.load(row_scales + columns)[None, :]
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
