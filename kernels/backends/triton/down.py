"""act = x @ [proj_down | lora_down * strength of RANK_TILE columns]: what a quantizing kernel makes of x beside codes.

Many rows: in the pass over x that quantizes; the sums of all columns stay in registers. Few rows, where each program
quantizes a piece of a row: by further programs of the same launch, which read x from the cache. Ranks are numbers of a
call: a layer with a LoRA runs the kernel that runs it without one.
"""

import triton
import triton.language as tl

from ... import layer

RANK_TILE = tl.constexpr(layer.RANK_TILE)
COLUMNS = 32  # of a program that makes columns and no codes
LEAST_ROWS = tl.constexpr(16)  # that tensor cores multiply
STEP = tl.constexpr(128)  # input channels that it reads at a time


@triton.jit
def down_of(proj_down, lora_down, k, column, R, R_LORA):
    """Pointers to [proj_down | lora_down][k, column]; both are (K, their rank)"""
    of_branch = proj_down + k[:, None] * R + column[None, :]
    of_lora = lora_down + k[:, None] * R_LORA + (column - R)[None, :]
    return tl.where((column < R)[None, :], of_branch, of_lora)


@triton.jit
def row_of(column, R, R_LORA):
    """Elements from a row to the next where `down_of` points to"""
    return tl.where(column < R, R, R_LORA)[None, :]


@triton.jit
def add_columns(acc, v, down, k, K, column, ranks, EVEN: tl.constexpr):
    """acc + v @ down, v a tile of x; zero where there is no column, or no channel k. EVEN: there is"""
    valid = (column < ranks)[None, :]
    if not EVEN:
        valid = valid & (k < K)[:, None]
    return tl.dot(v, tl.load(down, mask=valid, other=0.0).to(v.dtype), acc, input_precision="ieee")


@triton.jit
def store_columns(act, acc, strength, rows, inside, column, R, R_LORA, width):
    """act[rows, column] = acc, columns of the LoRA times their strength; act has `width` columns, maybe others' too"""
    valid = column < R + R_LORA
    factor = tl.load(strength + (column - R) // RANK_TILE, mask=valid & (column >= R), other=1.0)
    target = act + rows * width + column[None, :]
    tl.store(target, (acc * factor[None, :]).to(act.dtype.element_ty), mask=inside & valid[None, :])


@triton.jit
def make_columns(
    x,
    proj_down,
    lora_down,
    strength,
    act,
    tile,
    block,
    M,
    K,
    R,
    R_LORA,
    width,
    stride_x,
    BM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: columns from block * COLUMNS on of tile `tile` of BM rows, or of LEAST_ROWS where BM is less"""
    ROWS: tl.constexpr = BM if BM > LEAST_ROWS else LEAST_ROWS
    rm = tile * ROWS + tl.arange(0, ROWS)
    inside = (rm < M)[:, None]
    rows = rm[:, None].to(tl.int64)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    kk = tl.arange(0, STEP)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    down = down_of(proj_down, lora_down, kk, column, R, R_LORA)
    row = row_of(column, R, R_LORA)
    if tile * ROWS < M:  # else others have made them: there is a program for every BM rows
        for start in range(0, K, STEP):
            k = start + kk
            v = tl.load(x + rows * stride_x + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
            acc = add_columns(acc, v, down, k, K, column, R + R_LORA, False)
            down += row * STEP
        store_columns(act, acc, strength, rows, inside, column, R, R_LORA, width)
