"""INT4 on the INT4 tensor cores of Turing, Ampere and Ada (sm_75 to sm_89).

    y[m, n] = sum_g ascales[g, m] * wscales[g, n] * sum_{k in g} a[m, k] * w[n, k] + act @ up.T + bias

No language of the compiler knows 4-bit operands, so the instruction is written out. That is sound because the layout
puts every lane's registers where the instruction expects them: tensors are [column tile, warp along M, warp along N,
lane // 4, lane % 4], all but the first are the hardware's own axes, and an "elementwise" asm over them is one
instruction of each warp. What a lane does not need an axis for, row tiles and halves of the columns, are tuples.
Operand order inside a lane: PTX ISA, "Matrix Fragments for mma.m16n8k64" and "for mma.m8n8k32".

From Ampere on everything comes through a ring of stages in shared memory, copied 16 bytes at a time, one group of
channels per stage. Words of 4 bytes, one per register of an instruction: a lane's four are then where the instruction
wants them, and no moves are left in the loop.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ...order import COLUMNS
from .int4_steps import add_groups, add_low_rank, add_ring, axis, copy_group, next_group, pair, store_pair
from .tile_order import tile_position


@dataclass(frozen=True)
class WarpTiling:
    """Row tiles of 16 per warp, and how many warps lie along M and N; a warp is always 64 columns wide.

    stages  of the ring in shared memory; 0: every warp loads what it multiplies by itself
    """

    row_tiles: int
    warps_m: int
    warps_n: int
    stages: int = 0

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
LARGE, SMALL = WarpTiling(2, 4, 2, stages=4), WarpTiling(1, 1, 4, stages=4)
# Turing has a quarter of the shared memory, and nothing that copies to it asynchronously
LARGE_TURING, SMALL_TURING = WarpTiling(2, 2, 2), WarpTiling(1, 1, 4)
BAND = 8  # row tiles that share a pass over the columns
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PAIR = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}
SMALL_ROWS = 16  # up to here one row tile is all there is


@gluon.jit(do_not_specialize=["M", "first_unsigned", "stop_unsigned"])
def int4_mma_kernel(
    qact, ascales, codes, wscales, act, up, bias, out, M, N, K, R, as_step, first_unsigned, stop_unsigned,
    ROW_TILES: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    SIGNED: gl.constexpr, UNSIGNED: gl.constexpr, HAS_BIAS: gl.constexpr, WS: gl.constexpr,
):  # fmt: skip
    """One tile of y. Pointers are to 4-byte words of qact, 8-byte words of codes and 16-bit rows, pairs of the rest.

    codes, wscales    in fragment order, see kernels/order.py, N padded to whole tiles
    ascales           (K/64, as_step), the first M of each row count
    SIGNED, UNSIGNED  which kinds of groups there are; groups first_unsigned .. stop_unsigned - 1 are unsigned
    STAGES            of the ring in shared memory; 0, without one, is Turing
    WS                type of wscales: bf16, fp16 or fp32
    """
    DTYPE: gl.constexpr = ascales.dtype.element_ty
    KIND: gl.constexpr = "bf16" if DTYPE == gl.bfloat16 else "fp16"  # noqa: SIM300 (DTYPE is the variable here)
    ROWS: gl.constexpr = 16 * ROW_TILES * WARPS_M
    TURING: gl.constexpr = STAGES == 0
    # column tile of half a warp's columns, warp along M, warp along N, lane // 4, lane % 4
    L: gl.constexpr = gl.BlockedLayout([4, 1, 1, 1, 1], [1, 1, 1, 8, 4], [1, WARPS_M, WARPS_N, 1, 1], [0, 4, 3, 2, 1])
    column_tile = axis(4, 0, L)
    warp_m = axis(WARPS_M, 1, L)
    warp_n = axis(WARPS_N, 2, L)
    row_in_tile = axis(8, 3, L)
    thread = axis(4, 4, L)
    tile_m, tile_n = tile_position(gl.program_id(0), M, N, ROWS, 64 * WARPS_N, BAND)

    row = tile_m * ROWS + warp_m * (16 * ROW_TILES) + row_in_tile  # of the first row tile, and the one 8 below
    block = tile_n * WARPS_N + warp_n
    groups = K // 64
    tiles = gl.cdiv(N, 64)
    steps = (as_step, 256, 32)

    # the bits of MAGIC in four registers that the assembler cannot know: a constant it would make anew, one move for
    # each result of each product
    start = (0x4B400000 + (M >> 31), 0x4B400000 + (N >> 31), 0x4B400000 + (K >> 31), 0x4B400000 + (R >> 31))
    zeros = gl.zeros([4, WARPS_M, WARPS_N, 8, 4], gl.float32, layout=L)
    y = ()
    for _ in gl.static_range(2 * ROW_TILES):
        y += ((zeros, zeros, zeros, zeros),)  # type: ignore[assignment]
    if not TURING:
        # in place of the column tile: half and row tile of the activation; of the warp along N: its two words
        CA: gl.constexpr = gl.BlockedLayout(
            [1, 1, 1, 1, 4],
            [2, 1, 2, 8, 1],
            [ROW_TILES, WARPS_M, 1, 1, WARPS_N // ROW_TILES],
            [4, 3, 2, 0, 1],
        )
        CS: gl.constexpr = gl.BlockedLayout(
            [1, 1, 1, 8, 1],
            [2 * ROW_TILES, WARPS_M, 16 // (ROW_TILES * WARPS_M), 1, 1],
            [1, WARPS_M, WARPS_N, 1, 1],
            [3, 0, 1, 2, 4],
        )
        CB: gl.constexpr = gl.BlockedLayout(
            [1, 1, 1, 1, 2], [2, 1, 1, 8, 2], [WARPS_M, 1, WARPS_N, 1, 1], [4, 3, 0, 2, 1]
        )
        W: gl.constexpr = 2 if WS == "fp32" else 4  # pairs of scales in 16 bytes
        CW: gl.constexpr = gl.BlockedLayout(
            [W, 1, 1, 1, 1], [8 // W, 1, W // 2, 2, 4], [1, WARPS_M, WARPS_N, 1, 1], [0, 4, 2, 3, 1]
        )
        # in the order of the threads that copy: thread t writes from byte 16 t on
        A_CODES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 0, 1])
        B_CODES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 0, 2, 1])
        ROW_SCALES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 0, 1, 2, 4])
        COLUMN_SCALES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0, 4, 2, 3, 1])
        ring = (
            gl.allocate_shared_memory(gl.int32, [STAGES, 2 * ROW_TILES, WARPS_M, 2, 8, 4], A_CODES),
            gl.allocate_shared_memory(DTYPE, [STAGES, 2 * ROW_TILES, WARPS_M, 1, 8, 1], ROW_SCALES),
            gl.allocate_shared_memory(gl.int64, [STAGES, 8, 1, WARPS_N, 8, 4], B_CODES),
            gl.allocate_shared_memory(wscales.dtype.element_ty, [STAGES, 8, 1, WARPS_N, 1, 4], COLUMN_SCALES),
        )
        rows = tile_m * ROWS + axis(WARPS_M, 1, CA) * (16 * ROW_TILES) + axis(2 * ROW_TILES, 0, CA) * 8
        rows += axis(8, 3, CA)
        words = axis(2, 2, CA) * 4 + axis(4, 4, CA)
        scaled = tile_m * ROWS + axis(WARPS_M, 1, CS) * (16 * ROW_TILES) + axis(2 * ROW_TILES, 0, CS) * 8
        scaled += axis(8, 3, CS)
        b_start = gl.minimum(tile_n * WARPS_N + axis(WARPS_N, 2, CB), tiles - 1).to(gl.int64) * groups
        ws_start = gl.minimum(tile_n * WARPS_N + axis(WARPS_N, 2, CW), tiles - 1).to(gl.int64) * groups
        pointers = (
            qact + gl.minimum(rows, M - 1).to(gl.int64) * (groups * 8) + words,
            ascales + scaled,
            codes + b_start * 256 + (axis(8, 0, CB) * 32 + axis(8, 3, CB) * 4 + axis(4, 4, CB)),
            wscales + ws_start * 32 + (axis(4, 4, CW) * 8 + axis(8, 0, CW)),
        )
        inside = (rows < M, scaled < as_step)
        for g in gl.static_range(STAGES - 1):
            if g < groups:
                copy_group(ring, pointers, inside, g)
            async_copy.commit_group()
            pointers = next_group(pointers, steps)
        if SIGNED and UNSIGNED:
            y, pointers = add_ring(
                y, ring, pointers, steps, inside, start, 0, first_unsigned, groups, L, STAGES, False, WS
            )
            y, pointers = add_ring(
                y, ring, pointers, steps, inside, start, first_unsigned, stop_unsigned, groups, L, STAGES, True, WS
            )
            y, pointers = add_ring(
                y, ring, pointers, steps, inside, start, stop_unsigned, groups, groups, L, STAGES, False, WS
            )
        else:
            y, pointers = add_ring(y, ring, pointers, steps, inside, start, 0, groups, groups, L, STAGES, UNSIGNED, WS)
    else:
        b_start = gl.minimum(block, tiles - 1).to(gl.int64) * groups
        a = ()
        scales = ()
        for tile in gl.static_range(ROW_TILES):
            # rows and columns past the end repeat the last ones and are not stored
            low = gl.minimum(row + 16 * tile, M - 1)
            high = gl.minimum(row + 16 * tile + 8, M - 1)
            a += (  # type: ignore[assignment]
                (
                    qact + low.to(gl.int64) * (groups * 8) + thread,
                    qact + high.to(gl.int64) * (groups * 8) + thread,
                ),
            )
            scales += ((ascales + low, ascales + high),)  # type: ignore[assignment]
        pointers = (
            a,
            scales,
            codes + b_start * 256 + (column_tile * 32 + row_in_tile * 4 + thread),
            wscales + b_start * 32 + (thread * 8 + column_tile),
        )
        last = groups - 1
        if SIGNED and UNSIGNED:
            y = add_groups(y, pointers, steps, start, 0, first_unsigned, last, False, WS)
            y = add_groups(y, pointers, steps, start, first_unsigned, stop_unsigned, last, True, WS)
            y = add_groups(y, pointers, steps, start, stop_unsigned, groups, last, False, WS)
        else:
            y = add_groups(y, pointers, steps, start, 0, groups, last, UNSIGNED, WS)
    for part in gl.static_range(2 * ROW_TILES):
        columns = block * 64 + part // ROW_TILES * 32 + column_tile * 8
        n = gl.minimum(columns + row_in_tile, N - 1)  # the row of `up` that a lane hands over
        even = columns + thread * 2  # N is even: this column and the next are both inside or not
        first = row + part % ROW_TILES * 16
        low = gl.minimum(first, M - 1)
        high = gl.minimum(first + 8, M - 1)
        y0, y1, y2, y3 = add_low_rank(y[part], act, up, low, high, n, thread, R, TURING, KIND)
        if HAS_BIAS:
            b_even, b_odd = pair(gl.load(bias + gl.minimum(even, N - 2) // 2), KIND)
            y0 += b_even
            y1 += b_odd
            y2 += b_even
            y3 += b_odd
        pairs = out + first.to(gl.int64) * (N // 2) + even // 2
        store_pair(pairs, y0.to(DTYPE), y1.to(DTYPE), (first < M) & (even < N))
        store_pair(pairs + 4 * N, y2.to(DTYPE), y3.to(DTYPE), (first + 8 < M) & (even < N))


def compile_time(
    tiling: WarpTiling, k: int, act_unsigned: tuple[int, int], scales: torch.dtype, bias: bool
) -> dict[str, object]:
    """The compile-time arguments of a launch; `scales` is the dtype of wscales."""
    start, stop = act_unsigned
    return {
        "ROW_TILES": tiling.row_tiles,
        "WARPS_M": tiling.warps_m,
        "WARPS_N": tiling.warps_n,
        "STAGES": tiling.stages,
        "BAND": BAND,
        # for few rows, which wait for the weight, all unsigned is no kernel of its own
        "SIGNED": stop - start < k or tiling.row_tiles == 1,
        "UNSIGNED": start < stop,
        "HAS_BIAS": bias,
        "WS": KINDS[scales],
    }
