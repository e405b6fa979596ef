"""int8 GEMM for Hopper (sm_90) whose tensor-core instructions stay in flight while the next operands arrive.

    y[m, n] = a_scale[m] * w_scale[n] * sum_k a8[m, k] * w8[n, k] + act @ up.T + bias

The compiler waits for the tensor cores after every int8 step (its pipeliner lets only floating-point sums run on), so
the pipeline is written out: a ring of shared-memory stages filled by TMA, one group of instructions always in flight,
and one program per multiprocessor that goes through its tiles in one sequence of steps, so that the ring is refilled
for the next tile while a finished one is scaled and stored.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...stages import CodedActivation
from ..triton.start import Launch
from .low_rank import LowRank
from .tile_order import tile_position

# two names that changed after triton 3.6
block_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
INSTRUCTION_COLUMNS = 128  # of one int8 instruction; 256 is refused by the compiler
SLICE = 32  # columns of the low-rank factors that are multiplied at a time; more of them spill registers
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True)
class RingTiling:
    """Tile of one program, depth of one step and number of steps that fit the ring."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int


WIDE = RingTiling(128, 256, 128, 4, 8)  # fewest reads of shared memory per product
SQUARE = RingTiling(128, 128, 128, 3, 4)  # two programs fit one multiprocessor; for N that leaves wide tiles empty
BAND = 8  # row tiles that share a pass over the columns


@gluon.jit
def _load_step(
    a_desc, w_desc, a_ring, w_ring, full, step, ahead, M, N, K,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """Start the copies of one step into its stage. Returns where the step after it is: (tile, its row, column, k)."""
    tile, tile_m, tile_n, k = ahead
    stage = step % STAGES
    mbarrier.expect(full.index(stage), (ROWS + COLUMNS) * DEPTH)
    copy_block(a_desc, [tile_m * ROWS, k], full.index(stage), a_ring.index(stage))
    copy_block(w_desc, [tile_n * COLUMNS, k], full.index(stage), w_ring.index(stage))
    k += DEPTH
    if k >= K:
        k = 0
        tile += gl.num_programs(0)
        tile_m, tile_n = tile_position(tile, M, N, ROWS, COLUMNS, BAND)
    return tile, tile_m, tile_n, k


@gluon.jit
def _load_slice(
    act_desc, up_desc, act_slice, up_slice, full, tile_m, tile_n, r,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, SLICE: gl.constexpr,
):  # fmt: skip
    """Start the copies of SLICE columns of act and up; columns past the rank arrive as zeros."""
    mbarrier.expect(full, (ROWS + COLUMNS) * SLICE * 2)
    copy_block(act_desc, [tile_m * ROWS, r], full, act_slice)
    copy_block(up_desc, [tile_n * COLUMNS, r], full, up_slice)


@gluon.jit(do_not_specialize=["M"])
def int8_async_kernel(
    a_desc, w_desc, act_desc, up_desc, a_scale, w_scale, bias, out, M, N, K, R,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    BAND: gl.constexpr, SLICE: gl.constexpr, INSTRUCTION: gl.constexpr, LOW_RANK: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """All tiles program_id, program_id + num_programs, ... of y. Rows past M are not stored.

    RAGGED says that N is not a multiple of COLUMNS, and columns past it must not be touched either.
    """
    DTYPE: gl.constexpr = out.dtype.element_ty
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, INSTRUCTION, 32])
    a_ring = gl.allocate_shared_memory(gl.int8, [STAGES, ROWS, DEPTH], a_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES, COLUMNS, DEPTH], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for each in gl.static_range(STAGES + 1):
        mbarrier.init(full.index(each), count=1)
    if LOW_RANK:
        # the registers of this layout are those of ACC, the sum goes on in place
        SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, INSTRUCTION, 16])
        act_slice = gl.allocate_shared_memory(DTYPE, [ROWS, SLICE], act_desc.layout)
        up_slice = gl.allocate_shared_memory(DTYPE, [COLUMNS, SLICE], up_desc.layout)
    fence_async_shared()
    block_barrier()

    steps = gl.cdiv(K, DEPTH)
    tiles = gl.cdiv(M, ROWS) * gl.cdiv(N, COLUMNS)
    total = gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0)) * steps
    first_m, first_n = tile_position(gl.program_id(0), M, N, ROWS, COLUMNS, BAND)
    ahead = (gl.program_id(0), first_m, first_n, gl.to_tensor(0))
    for each in gl.static_range(STAGES - 1):
        if each < total:
            ahead = _load_step(
                a_desc, w_desc, a_ring, w_ring, full, each, ahead, M, N, K, ROWS, COLUMNS, DEPTH, STAGES, BAND
            )  # fmt: skip
    step = 0
    slices = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = tile_position(tile, M, N, ROWS, COLUMNS, BAND)
        if LOW_RANK:
            _load_slice(
                act_desc, up_desc, act_slice, up_slice, full.index(STAGES), tile_m, tile_n, 0, ROWS, COLUMNS, SLICE
            )
        acc = warpgroup_mma_init(gl.zeros([ROWS, COLUMNS], gl.int32, layout=ACC))
        for _ in range(0, steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            acc = warpgroup_mma(a_ring.index(stage), w_ring.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            # the step before has been read by this warpgroup; behind the barrier by all, and its stage is free
            block_barrier()
            if step + STAGES - 1 < total:
                ahead = _load_step(
                    a_desc, w_desc, a_ring, w_ring, full, step + STAGES - 1, ahead, M, N, K,
                    ROWS, COLUMNS, DEPTH, STAGES, BAND,
                )  # fmt: skip
            step += 1
        sums = warpgroup_mma_wait(0, deps=(acc,))

        row = tile_m * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
        column = tile_n * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, ACC))
        row_scale = gl.load(a_scale + row, mask=row < M, other=0.0)
        column_scale = gl.load(w_scale + column, mask=column < N, other=0.0) if RAGGED else gl.load(w_scale + column)
        y = sums.to(gl.float32) * row_scale[:, None] * column_scale[None, :]
        if LOW_RANK:
            y = gl.convert_layout(y, SUM)
            for r in range(0, R, SLICE):
                mbarrier.wait(full.index(STAGES), slices & 1)
                y = warpgroup_mma(act_slice, up_slice.permute((1, 0)), y)
                slices += 1
                block_barrier()  # every warpgroup has read the slice
                if r + SLICE < R:
                    _load_slice(
                        act_desc, up_desc, act_slice, up_slice, full.index(STAGES), tile_m, tile_n, r + SLICE,
                        ROWS, COLUMNS, SLICE,
                    )  # fmt: skip
            y = gl.convert_layout(y, ACC)
        pointer = out + row[:, None].to(gl.int64) * N + column[None, :]
        if RAGGED:
            y += gl.load(bias + column, mask=column < N, other=0.0).to(gl.float32)[None, :]
            gl.store(pointer, y.to(DTYPE), mask=(row < M)[:, None] & (column < N)[None, :])
        else:
            y += gl.load(bias + column).to(gl.float32)[None, :]
            gl.store(pointer, y.to(DTYPE), mask=(row < M)[:, None])
    for each in gl.static_range(STAGES + 1):
        mbarrier.invalidate(full.index(each))


def tiling_of(n: int) -> RingTiling:
    """The tiling for N = n."""
    return WIDE if n % WIDE.columns == 0 else SQUARE


def compile_time(tiling: RingTiling, low_rank: bool) -> dict[str, object]:
    """The compile-time arguments of a launch."""
    return {
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
        "DEPTH": tiling.depth,
        "STAGES": tiling.stages,
        "WARPS": tiling.warps,
        "BAND": BAND,
        "SLICE": SLICE,
        "INSTRUCTION": INSTRUCTION_COLUMNS,
        "LOW_RANK": low_rank,
        "RAGGED": tiling is not WIDE,  # WIDE is only used where it divides N
    }


def blocks(tiling: RingTiling, dtype: torch.dtype) -> dict[str, tuple[list[int], object]]:
    """{descriptor argument: (shape of a copied block, its order in shared memory)}"""
    shapes = {
        "a_desc": ([tiling.rows, tiling.depth], gl.int8),
        "w_desc": ([tiling.columns, tiling.depth], gl.int8),
        "act_desc": ([tiling.rows, SLICE], TYPES[dtype]),
        "up_desc": ([tiling.columns, SLICE], TYPES[dtype]),
    }
    return {
        name: (block, gl.NVMMASharedLayout.get_default_for(block, type_)) for name, (block, type_) in shapes.items()
    }


class Copied:
    """Descriptors of tensors that are copied in such blocks, for a launch each

    The driver's map of a tensor is made from address, shape and strides alone, and by each launch: no tensor is kept,
    and none is mistaken for another one at its address. What else is in a descriptor is checked once, by Triton.
    """

    def __init__(self, block: list[int], layout: object) -> None:
        self.block, self.layout = block, layout
        self.known: dict[str, object] | None = None

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        if self.known is None:
            made = TensorDescriptor.from_tensor(tensor, self.block, self.layout)
            self.known = {**vars(made), "base": None}
            return made
        made = object.__new__(TensorDescriptor)
        made.__dict__.update(self.known, base=tensor, shape=tensor.shape, strides=tensor.stride())
        return made


class Int8Gemm:
    """out = (qact @ weight.T) * ascales[:, None] * row_scales + low_rank.act @ low_rank.up.T + bias, for N = n

    Layouts, tiling and the number of programs are found once; no tensor is kept but the zeros of layers without bias.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, n: int, low_rank: bool) -> None:
        self.n, self.tiling = n, tiling_of(n)
        self.columns = -(-n // self.tiling.columns)
        each = 1 if self.tiling is WIDE else 2
        self.programs = each * torch.cuda.get_device_properties(device).multi_processor_count
        self.copied = [Copied(*each) for each in blocks(self.tiling, dtype).values()]
        flags = {**compile_time(self.tiling, low_rank), "num_warps": self.tiling.warps}
        self.launch = Launch(int8_async_kernel, flags)
        self.zeros: torch.Tensor | None = None

    def __call__(
        self,
        act: CodedActivation,
        rows: tuple[torch.Tensor, torch.Tensor],
        low_rank: LowRank | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Returns out, see int8_gemm; rows are weight and row_scales"""
        (qact, ascales), (weight, row_scales) = act, rows
        m, k = qact.shape
        if m == 0:
            return out
        of_act, of_weight, of_branch, of_up = self.copied
        if low_rank is None:
            rank, descriptors = 0, (of_act.of(qact), of_weight.of(weight), None, None)
        else:
            branch_act, up = low_rank
            rank = up.shape[1]
            descriptors = of_act.of(qact), of_weight.of(weight), of_branch.of(branch_act), of_up.of(up)
        tiles = -(-m // self.tiling.rows) * self.columns
        if bias is None:
            # a kernel of its own would be compiled for it, and one that asks at run time has too few registers
            bias = self.zeros = out.new_zeros(self.n) if self.zeros is None else self.zeros
        self.launch(
            (min(tiles, self.programs), 1, 1), (ascales, row_scales, bias, out), (m, self.n, k, rank), descriptors
        )
        return out


def int8_gemm(
    act: CodedActivation,
    weight: torch.Tensor,
    row_scales: torch.Tensor,
    low_rank: LowRank | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Int8Gemm, for one call

    act         qact (M, K) int8, K a multiple of 16: rows of a copy start at 16 bytes; ascales (M,) float32
    weight      (N, K) int8, row_scales (N,) float32
    low_rank    in the dtype of out, here of any rank that is a multiple of 8; or None
    bias        (N,) any float dtype, or None
    out         (M, N) bfloat16 or float16; every tensor contiguous. Returns out
    """
    gemm = Int8Gemm(act.qact.device, out.dtype, weight.shape[0], low_rank is not None)
    return gemm(act, (weight, row_scales), low_rank, bias, out)
