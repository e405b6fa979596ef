"""INT4 on the INT4 tensor cores of Turing, Ampere and Ada (sm_75 to sm_89).

    y[m, n] = sum_g ascales[g, m] * wscales[g, n] * sum_{k in g} a[m, k] * w[n, k] + act @ up.T + bias

No language of the compiler knows 4-bit operands, so the instruction is written out. That is sound because the layout
puts every lane's registers where the instruction expects them: tensors are [row tile, column tile, warp, lane], the
last two axes are the hardware's own, and an "elementwise" asm over them is one instruction of each warp.
Operand order inside a lane: PTX ISA, "Matrix Fragments for mma.m16n8k64" and "for mma.m8n8k32".
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ... import layer
from ...order import COLUMNS
from .tile_order import tile_position

# 1.5 * 2**23: floats of this size lie one apart, so its bits plus a small integer are the bits of the float plus that
# one; with 1.5 instead of 1 negative integers do not borrow from the exponent
MAGIC = gl.constexpr(12582912.0)
RANK_TILE = gl.constexpr(layer.RANK_TILE)


@dataclass(frozen=True)
class WarpTiling:
    """Row tiles of 16 per warp, and how many warps lie along M and N; a warp is always 64 columns wide."""

    row_tiles: int
    warps_m: int
    warps_n: int

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles * self.warps_m

    @property
    def columns(self) -> int:
        return COLUMNS * self.warps_n

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n


# two row tiles reuse each weight register twice and keep a lane's sums in 64 registers
LARGE = WarpTiling(2, 2, 2)
SMALL = WarpTiling(1, 1, 4)
BAND = 8  # row tiles that share a pass over the columns
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PAIR = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}
SMALL_ROWS = 16  # up to here one row tile is all there is


@gluon.jit
def _mma_int4(a_low, a_high, b, TURING: gl.constexpr, UNSIGNED: gl.constexpr):
    """Bits of MAGIC + (16, 64) @ (64, 8): rows l // 4 and 8 + l // 4, columns 2 (l % 4) and one more, four results.

    Starting at MAGIC saves the conversion to float: the result's bits are a float already.
    """
    KIND: gl.constexpr = ".row.col.s32." + ("u4" if UNSIGNED else "s4") + ".s4.s32 "
    UNPACK: gl.constexpr = (
        "{.reg .b32 p, q, r, s, u, v, z; mov.b64 {p, q}, $4; mov.b64 {r, s}, $5; mov.b64 {u, v}, $6; "
        "mov.b32 z, 0x4B400000; "
    )
    if TURING:
        MMA: gl.constexpr = "mma.sync.aligned.m8n8k32" + KIND
        TEXT: gl.constexpr = (
            UNPACK
            + (MMA + "{$0, $1}, {p}, {u}, {z, z}; ")
            + (MMA + "{$0, $1}, {q}, {v}, {$0, $1}; ")
            + (MMA + "{$2, $3}, {r}, {u}, {z, z}; ")
            + (MMA + "{$2, $3}, {s}, {v}, {$2, $3};}")
        )
        # early clobber: results are written while operands are still to be read
        return gl.inline_asm_elementwise(
            TEXT, "=&r,=&r,=&r,=&r,l,l,l", [a_low, a_high, b], (gl.int32, gl.int32, gl.int32, gl.int32), True, 1
        )
    else:
        TEXT80: gl.constexpr = (
            UNPACK + "mma.sync.aligned.m16n8k64" + KIND + "{$0, $1, $2, $3}, {p, r, q, s}, {u, v}, {z, z, z, z};}"
        )
        return gl.inline_asm_elementwise(
            TEXT80, "=r,=r,=r,=r,l,l,l", [a_low, a_high, b], (gl.int32, gl.int32, gl.int32, gl.int32), True, 1
        )


@gluon.jit
def _mma_16bit(a_low, a_high, b, c0, c1, c2, c3, TURING: gl.constexpr, KIND: gl.constexpr):
    """c + (16, 16) @ (16, 8) in 16-bit floats; same lanes and results as _mma_int4."""
    UNPACK: gl.constexpr = "{.reg .b32 p, q, r, s, u, v; mov.b64 {p, q}, $4; mov.b64 {r, s}, $5; mov.b64 {u, v}, $6; "
    MMA75: gl.constexpr = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, "
    TEXT75: gl.constexpr = (
        UNPACK + (MMA75 + "{p, r}, {u}, {$7, $8, $9, $10}; ") + (MMA75 + "{q, s}, {v}, {$0, $1, $2, $3};}")
    )
    TYPE: gl.constexpr = "bf16" if KIND == "bf16" else "f16"
    TEXT80: gl.constexpr = (
        UNPACK
        + ("mma.sync.aligned.m16n8k16.row.col.f32." + TYPE + "." + TYPE + ".f32 {$0, $1, $2, $3}, ")
        + "{p, r, q, s}, {u, v}, {$7, $8, $9, $10};}"
    )
    TEXT: gl.constexpr = TEXT75 if TURING else TEXT80
    return gl.inline_asm_elementwise(
        TEXT,
        "=&f,=&f,=&f,=&f,l,l,l,f,f,f,f",
        [a_low, a_high, b, c0, c1, c2, c3],
        (gl.float32, gl.float32, gl.float32, gl.float32),
        True,
        1,
    )


@gluon.jit
def _pair(bits, KIND: gl.constexpr):
    """The two floats in one word, as float32: (low half, high half)."""
    if KIND == "fp32":
        return bits.to(gl.int32).to(gl.float32, bitcast=True), (bits >> 32).to(gl.int32).to(gl.float32, bitcast=True)
    elif KIND == "bf16":
        return (bits << 16).to(gl.float32, bitcast=True), (bits & -65536).to(gl.float32, bitcast=True)
    else:
        low = bits.to(gl.int16).to(gl.float16, bitcast=True)
        high = (bits >> 16).to(gl.int16).to(gl.float16, bitcast=True)
        return low.to(gl.float32), high.to(gl.float32)


@gluon.jit
def _load_group(pointers, steps, g):
    """What the pointers point to in group g."""
    a_low, a_high, b, as_low, as_high, ws = pointers
    b_step, as_step, ws_step = steps
    return (
        gl.load(a_low + g * 4),
        gl.load(a_high + g * 4),
        gl.load(b + g * b_step),
        gl.load(as_low + g * as_step),
        gl.load(as_high + g * as_step),
        gl.load(ws + g * ws_step),
    )


@gluon.jit
def _add_groups(y, pointers, steps, first, stop, last, TURING: gl.constexpr, UNSIGNED: gl.constexpr, WS: gl.constexpr):
    """y + the scaled products of groups first .. stop - 1; loads run one group ahead and never past group `last`."""
    y0, y1, y2, y3 = y
    a_low, a_high, b, as_low, as_high, ws = _load_group(pointers, steps, gl.minimum(first, last))
    for g in range(first, stop):
        i0, i1, i2, i3 = _mma_int4(a_low, a_high, b, TURING, UNSIGNED)
        s_low = as_low.to(gl.float32)
        s_high = as_high.to(gl.float32)
        w_even, w_odd = _pair(ws, WS)
        a_low, a_high, b, as_low, as_high, ws = _load_group(pointers, steps, gl.minimum(g + 1, last))
        # fma(MAGIC + i, s, -MAGIC * s) is i * s rounded once: MAGIC has two significant bits, so MAGIC * s is exact
        m_low = s_low * -MAGIC
        m_high = s_high * -MAGIC
        y0 = gl.fma(gl.fma(i0.to(gl.float32, bitcast=True), s_low, m_low), w_even, y0)
        y1 = gl.fma(gl.fma(i1.to(gl.float32, bitcast=True), s_low, m_low), w_odd, y1)
        y2 = gl.fma(gl.fma(i2.to(gl.float32, bitcast=True), s_high, m_high), w_even, y2)
        y3 = gl.fma(gl.fma(i3.to(gl.float32, bitcast=True), s_high, m_high), w_odd, y3)
    return y0, y1, y2, y3


@gluon.jit
def _axis(SIZE: gl.constexpr, AXIS: gl.constexpr, L: gl.constexpr):
    """0 .. SIZE - 1 along one of the four axes of L, every other axis of length 1."""
    if AXIS == 0:
        ALONG_ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L)))
        return gl.arange(0, SIZE, layout=ALONG_ROWS)[:, None][:, :, None][:, :, :, None]
    elif AXIS == 1:
        ALONG_COLUMNS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L)))
        return gl.arange(0, SIZE, layout=ALONG_COLUMNS)[None, :][:, :, None][:, :, :, None]
    elif AXIS == 2:
        ALONG_WARPS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(3, L)))
        return gl.arange(0, SIZE, layout=ALONG_WARPS)[None, :][None, :, :][:, :, :, None]
    else:
        ALONG_LANES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, L)))
        return gl.arange(0, SIZE, layout=ALONG_LANES)[None, :][None, :, :][None, :, :, :]


@gluon.jit
def _add_low_rank(y, act, up, low, high, n, lane, R, TURING: gl.constexpr, KIND: gl.constexpr):
    """y + act @ up.T; low and high are the lane's rows, n the weight row it hands over."""
    y0, y1, y2, y3 = y
    a_low = act + low.to(gl.int64) * (R // 4) + lane % 4
    a_high = act + high.to(gl.int64) * (R // 4) + lane % 4
    b = up + n.to(gl.int64) * (R // 4) + lane % 4
    for r in range(0, R // RANK_TILE):
        y0, y1, y2, y3 = _mma_16bit(
            gl.load(a_low + r * 4), gl.load(a_high + r * 4), gl.load(b + r * 4), y0, y1, y2, y3, TURING, KIND
        )
    return y0, y1, y2, y3


@gluon.jit
def _store_pair(pointer, even, odd, inside):
    """Two neighbouring columns in one 4-byte store."""
    low = even.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    high = odd.to(gl.int16, bitcast=True).to(gl.int32) << 16
    gl.store(pointer, low | high, mask=inside)


@gluon.jit(do_not_specialize=["M", "first_unsigned", "stop_unsigned"])
def int4_mma_kernel(
    qact, ascales, codes, wscales, act, up, bias, out, M, N, K, R, first_unsigned, stop_unsigned,
    ROW_TILES: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, BAND: gl.constexpr, SIGNED: gl.constexpr,
    UNSIGNED: gl.constexpr, HAS_BIAS: gl.constexpr, TURING: gl.constexpr, WS: gl.constexpr,
):  # fmt: skip
    """One tile of y. Pointers are to 8-byte words of codes and 16-bit rows, and to pairs of wscales, bias and out.

    codes, wscales    in fragment order, see kernels/order.py, N padded to whole tiles

    SIGNED, UNSIGNED  which kinds of groups there are; groups first_unsigned .. stop_unsigned - 1 are unsigned
    WS                type of wscales: bf16, fp16 or fp32
    """
    DTYPE: gl.constexpr = ascales.dtype.element_ty
    KIND: gl.constexpr = "bf16" if DTYPE == gl.bfloat16 else "fp16"  # noqa: SIM300 (DTYPE is the variable here)
    WARPS: gl.constexpr = WARPS_M * WARPS_N
    # column tiles are the fastest axis in registers: a lane's neighbouring loads become one of 16 bytes
    L: gl.constexpr = gl.BlockedLayout([ROW_TILES, 8, 1, 1], [1, 1, 1, 32], [1, 1, WARPS, 1], [1, 3, 2, 0])
    row_tile = _axis(ROW_TILES, 0, L)
    column_tile = _axis(8, 1, L)
    warp = _axis(WARPS, 2, L)
    lane = _axis(32, 3, L)
    tile_m, tile_n = tile_position(gl.program_id(0), M, N, 16 * ROW_TILES * WARPS_M, 64 * WARPS_N, BAND)

    row = (tile_m * WARPS_M + warp // WARPS_N) * (16 * ROW_TILES) + row_tile * 16 + lane // 4  # [ROW_TILES, 1, W, 32]
    block = tile_n * WARPS_N + warp % WARPS_N  # [1, 1, W, 1]
    even = block * 64 + column_tile * 8 + lane % 4 * 2  # N is even: this column and the next are both inside or not
    # rows and columns past the end repeat the last ones and are not stored
    low = gl.minimum(row, M - 1)
    high = gl.minimum(row + 8, M - 1)
    n = gl.minimum(block * 64 + column_tile * 8 + lane // 4, N - 1)  # [1, 8, W, 32], the weight row a lane hands over
    groups = K // 64
    steps = (256, M, 32)
    packed = gl.minimum(block, gl.cdiv(N, 64) - 1).to(gl.int64) * groups
    b = codes + packed * 256 + column_tile // 2 * 64 + lane * 2 + column_tile % 2
    ws = wscales + packed * 32 + lane % 4 * 8 + column_tile
    a_low = qact + low.to(gl.int64) * (groups * 4) + lane % 4
    a_high = qact + high.to(gl.int64) * (groups * 4) + lane % 4
    pointers = (a_low, a_high, b, ascales + low, ascales + high, ws)

    zeros = gl.zeros([ROW_TILES, 8, WARPS, 32], gl.float32, layout=L)
    y = (zeros, zeros, zeros, zeros)
    if SIGNED and UNSIGNED:
        y = _add_groups(y, pointers, steps, 0, first_unsigned, groups - 1, TURING, False, WS)
        y = _add_groups(y, pointers, steps, first_unsigned, stop_unsigned, groups - 1, TURING, True, WS)
        y = _add_groups(y, pointers, steps, stop_unsigned, groups, groups - 1, TURING, False, WS)
    else:
        y = _add_groups(y, pointers, steps, 0, groups, groups - 1, TURING, UNSIGNED, WS)
    y0, y1, y2, y3 = _add_low_rank(y, act, up, low, high, n, lane, R, TURING, KIND)
    if HAS_BIAS:
        b_even, b_odd = _pair(gl.load(bias + gl.minimum(even, N - 2) // 2), KIND)
        y0 += b_even
        y1 += b_odd
        y2 += b_even
        y3 += b_odd
    pairs = out + row.to(gl.int64) * (N // 2) + even // 2
    _store_pair(pairs, y0.to(DTYPE), y1.to(DTYPE), (row < M) & (even < N))
    _store_pair(pairs + 4 * N, y2.to(DTYPE), y3.to(DTYPE), (row + 8 < M) & (even < N))


def compile_time(
    tiling: WarpTiling, k: int, act_unsigned: tuple[int, int], scales: torch.dtype, bias: bool, turing: bool
) -> dict[str, object]:
    """The compile-time arguments of a launch; `scales` is the dtype of wscales."""
    start, stop = act_unsigned
    return {
        "ROW_TILES": tiling.row_tiles,
        "WARPS_M": tiling.warps_m,
        "WARPS_N": tiling.warps_n,
        "BAND": BAND,
        "SIGNED": stop - start < k,
        "UNSIGNED": start < stop,
        "HAS_BIAS": bias,
        "TURING": turing,
        "WS": KINDS[scales],
    }
