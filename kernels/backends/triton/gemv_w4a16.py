"""y[m, n] = sum over groups g of wscales[g, n] * (x[m] . (code - 8)[n]) + wzeros[g, n] * sum(x[m]), + bias[n]

For modulation layers: one row per image, bound by reading the weight once. Codes minus 8 are exact in 16 bit.
"""

import triton
import triton.language as tl

from .epilogue import store


@triton.jit(do_not_specialize=["M"])
def gemv_w4a16(
    x,
    qweight,
    wscales,
    wzeros,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One program: BM rows, BN columns. x (M, K), qweight (N, K/2), wscales and wzeros (K/64, N)"""
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (rm < M)[:, None]
    columns = tl.where(rn < N, rn, 0)
    half = tl.arange(0, 32)
    xp = x + rm[:, None].to(tl.int64) * stride_x + 2 * half[None, :]
    wp = qweight + columns[None, :].to(tl.int64) * (K // 2) + half[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for g in range(0, K // 64):
        b = tl.load(wp).to(tl.int32)
        even = tl.load(xp, mask=inside, other=0.0)
        odd = tl.load(xp + 1, mask=inside, other=0.0)
        low = ((b & 15) - 8).to(tl.float32).to(even.dtype)
        high = (((b >> 4) & 15) - 8).to(tl.float32).to(even.dtype)
        d = tl.dot(even, low, input_precision="ieee")
        d = tl.dot(odd, high, d, input_precision="ieee")
        total = tl.sum(even.to(tl.float32) + odd.to(tl.float32), axis=1)
        scale = tl.load(wscales + g * N + columns).to(tl.float32)
        zero = tl.load(wzeros + g * N + columns).to(tl.float32)
        acc += d * scale[None, :] + total[:, None] * zero[None, :]
        xp += 64
        wp += 32
    if BIAS:
        acc += tl.load(bias + columns).to(tl.float32)[None, :]
    store(out, acc, rm, rn, M, N)
