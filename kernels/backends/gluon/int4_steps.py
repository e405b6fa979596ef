"""The steps of the INT4 tensor-core kernel: its instructions, written out, one group of channels, the ring of stages.

Tensors are [column tile, warp along M, warp along N, lane // 4, lane % 4], see int4_mma.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ... import layer

# a name that changed after triton 3.6
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
# 1.5 * 2**23: floats of this size lie one apart, so its bits plus a small integer are the bits of the float plus that
# one; with 1.5 instead of 1 negative integers do not borrow from the exponent
MAGIC = gl.constexpr(12582912.0)
RANK_TILE = gl.constexpr(layer.RANK_TILE)


@gluon.jit
def _mma_int4(a, b, start, TURING: gl.constexpr, UNSIGNED: gl.constexpr):
    """Bits of MAGIC + (16, 64) @ (64, 8): rows l // 4 and 8 + l // 4, columns 2 (l % 4) and one more, four results.

    a      four words of a lane: two of its first row, two of its second
    start  the bits of MAGIC, four times: the result's bits are a float already, without a conversion
    """
    p, q, r, s = a
    z0, z1, z2, z3 = start
    KIND: gl.constexpr = ".row.col.s32." + ("u4" if UNSIGNED else "s4") + ".s4.s32 "
    UNPACK: gl.constexpr = "{.reg .b32 u, v; mov.b64 {u, v}, $8; "
    if TURING:
        MMA: gl.constexpr = "mma.sync.aligned.m8n8k32" + KIND
        TEXT: gl.constexpr = (
            UNPACK
            + (MMA + "{$0, $1}, {$4}, {u}, {$9, $10}; ")
            + (MMA + "{$0, $1}, {$5}, {v}, {$0, $1}; ")
            + (MMA + "{$2, $3}, {$6}, {u}, {$11, $12}; ")
            + (MMA + "{$2, $3}, {$7}, {v}, {$2, $3};}")
        )
        # early clobber: results are written while operands are still to be read
        CONSTRAINTS: gl.constexpr = "=&r,=&r,=&r,=&r,r,r,r,r,l,r,r,r,r"
    else:
        TEXT80: gl.constexpr = (
            UNPACK
            + "mma.sync.aligned.m16n8k64"
            + KIND
            + "{$0, $1, $2, $3}, {$4, $6, $5, $7}, {u, v}, {$9, $10, $11, $12};}"
        )
        CONSTRAINTS80: gl.constexpr = "=r,=r,=r,=r,r,r,r,r,l,r,r,r,r"
    return gl.inline_asm_elementwise(
        TEXT if TURING else TEXT80,
        CONSTRAINTS if TURING else CONSTRAINTS80,
        [p, q, r, s, b, z0, z1, z2, z3],
        (gl.int32, gl.int32, gl.int32, gl.int32),
        True,
        1,
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
def pair(bits, KIND: gl.constexpr):
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
def axis(SIZE: gl.constexpr, AXIS: gl.constexpr, L: gl.constexpr):
    """0 .. SIZE - 1 along one of the five axes of L, every other axis of length 1."""
    S: gl.constexpr = gl.SliceLayout
    if AXIS == 0:
        numbers = gl.arange(0, SIZE, layout=S(1, S(2, S(3, S(4, L)))))
    elif AXIS == 1:
        numbers = gl.arange(0, SIZE, layout=S(0, S(2, S(3, S(4, L)))))
    elif AXIS == 2:
        numbers = gl.arange(0, SIZE, layout=S(0, S(0, S(3, S(4, L)))))
    elif AXIS == 3:
        numbers = gl.arange(0, SIZE, layout=S(0, S(0, S(0, S(4, L)))))
    else:
        numbers = gl.arange(0, SIZE, layout=S(0, S(0, S(0, S(0, L)))))
    for _ in gl.static_range(AXIS):
        numbers = gl.expand_dims(numbers, 0)
    for behind in gl.static_range(AXIS + 1, 5):
        numbers = gl.expand_dims(numbers, behind)
    return numbers


@gluon.jit
def _scale_and_add(y, a, b, scales, ws, start, TURING: gl.constexpr, UNSIGNED: gl.constexpr):
    """y of one row tile + the product of one group times the scales of its rows and columns"""
    y0, y1, y2, y3 = y
    s_low, s_high = scales
    w_even, w_odd = ws
    i0, i1, i2, i3 = _mma_int4(a, b, start, TURING, UNSIGNED)
    s_low = s_low.to(gl.float32)
    s_high = s_high.to(gl.float32)
    # fma(MAGIC + i, s, -MAGIC * s) is i * s rounded once: MAGIC has two significant bits, so MAGIC * s is exact
    m_low = s_low * -MAGIC
    m_high = s_high * -MAGIC
    y0 = gl.fma(gl.fma(i0.to(gl.float32, bitcast=True), s_low, m_low), w_even, y0)
    y1 = gl.fma(gl.fma(i1.to(gl.float32, bitcast=True), s_low, m_low), w_odd, y1)
    y2 = gl.fma(gl.fma(i2.to(gl.float32, bitcast=True), s_high, m_high), w_even, y2)
    y3 = gl.fma(gl.fma(i3.to(gl.float32, bitcast=True), s_high, m_high), w_odd, y3)
    return y0, y1, y2, y3


@gluon.jit
def _add_group(y, group, start, TURING: gl.constexpr, UNSIGNED: gl.constexpr, WS: gl.constexpr):
    """y of all parts of a warp's tile + the scaled product of one group"""
    a, scales, b, ws = group
    total = ()
    for half in gl.static_range(2):
        columns = pair(ws[half], WS)
        for tile in gl.static_range(len(a)):
            part = y[half * len(a) + tile]
            total += (_scale_and_add(part, a[tile], b[half], scales[tile], columns, start, TURING, UNSIGNED),)  # type: ignore[assignment]
    return total


@gluon.jit
def _load_group(pointers, steps, g):
    """What the pointers point to in group g: words and scales of each row tile, of each half of the columns."""
    a, scales, b, ws = pointers
    as_step, b_step, ws_step = steps
    words, rows = (), ()
    for tile in gl.static_range(len(a)):
        low, high = a[tile]
        words += ((gl.load(low + g * 8), gl.load(low + g * 8 + 4), gl.load(high + g * 8), gl.load(high + g * 8 + 4)),)
        low, high = scales[tile]
        rows += ((gl.load(low + g * as_step), gl.load(high + g * as_step)),)
    b += g * b_step
    ws += g * ws_step
    return words, rows, (gl.load(b), gl.load(b + 128)), (gl.load(ws), gl.load(ws + 4))


@gluon.jit
def add_groups(y, pointers, steps, start, first, stop, last, UNSIGNED: gl.constexpr, WS: gl.constexpr):
    """y + the scaled products of groups first .. stop - 1; loads run one group ahead and never past group `last`."""
    group = _load_group(pointers, steps, gl.minimum(first, last))
    for g in range(first, stop):
        following = _load_group(pointers, steps, gl.minimum(g + 1, last))
        y = _add_group(y, group, start, True, UNSIGNED, WS)
        group = following
    return y


@gluon.jit
def copy_group(ring, pointers, inside, stage):
    """Start the copies of what the pointers point to."""
    a_ring, as_ring, b_ring, ws_ring = ring
    a, scales, b, ws = pointers
    a_inside, as_inside = inside
    copy_async(a_ring.index(stage), a, mask=a_inside)
    copy_async(b_ring.index(stage), b)
    copy_async(as_ring.index(stage), scales, mask=as_inside)
    copy_async(ws_ring.index(stage), ws)


@gluon.jit
def next_group(pointers, steps):
    """The pointers, one group on"""
    a, scales, b, ws = pointers
    as_step, b_step, ws_step = steps
    return a + 8, scales + as_step, b + b_step, ws + ws_step


@gluon.jit
def _read_group(ring, g, L: gl.constexpr, ROW_TILES: gl.constexpr, STAGES: gl.constexpr):
    """What a lane multiplies in group g: words and scales of each row tile, of each half of the columns."""
    a_ring, as_ring, b_ring, ws_ring = ring
    stage = g % STAGES
    a = a_ring.index(stage)
    scales = as_ring.index(stage)
    words, rows = (), ()
    for tile in gl.static_range(ROW_TILES):
        low = a.slice(2 * tile, 1, 0)
        high = a.slice(2 * tile + 1, 1, 0)
        words += (  # type: ignore[assignment]
            (
                low.slice(0, 1, 2).load(L),
                low.slice(1, 1, 2).load(L),
                high.slice(0, 1, 2).load(L),
                high.slice(1, 1, 2).load(L),
            ),
        )
        rows += ((scales.slice(2 * tile, 1, 0).load(L), scales.slice(2 * tile + 1, 1, 0).load(L)),)  # type: ignore[assignment]
    b = b_ring.index(stage)
    ws = ws_ring.index(stage)
    b_halves = (b.slice(0, 4, 0).load(L), b.slice(4, 4, 0).load(L))
    return words, rows, b_halves, (ws.slice(0, 4, 0).load(L), ws.slice(4, 4, 0).load(L))


@gluon.jit
def add_ring(
    y, ring, pointers, steps, inside, start, first, stop, groups, L: gl.constexpr, STAGES: gl.constexpr,
    UNSIGNED: gl.constexpr, WS: gl.constexpr,
):  # fmt: skip
    """y + the scaled products of groups first .. stop - 1; `pointers` are STAGES - 1 groups ahead, before and after."""
    for g in range(first, stop):
        async_copy.wait_group(STAGES - 2)
        # into the stage that was read in the last step, by all: the wait has a barrier behind it
        if g + STAGES - 1 < groups:
            copy_group(ring, pointers, inside, (g + STAGES - 1) % STAGES)
        async_copy.commit_group()
        pointers = next_group(pointers, steps)
        y = _add_group(y, _read_group(ring, g, L, len(y) // 2, STAGES), start, False, UNSIGNED, WS)
    return y, pointers


@gluon.jit
def add_low_rank(y, act, up, low, high, n, thread, R, TURING: gl.constexpr, KIND: gl.constexpr):
    """y + act @ up.T; low and high are the lane's rows, n the weight row it hands over, thread is lane % 4."""
    y0, y1, y2, y3 = y
    a_low = act + low.to(gl.int64) * (R // 4) + thread
    a_high = act + high.to(gl.int64) * (R // 4) + thread
    b = up + n.to(gl.int64) * (R // 4) + thread
    for r in range(0, R // RANK_TILE):
        y0, y1, y2, y3 = _mma_16bit(
            gl.load(a_low + r * 4), gl.load(a_high + r * 4), gl.load(b + r * 4), y0, y1, y2, y3, TURING, KIND
        )
    return y0, y1, y2, y3


@gluon.jit
def store_pair(pointer, even, odd, inside):
    """Two neighbouring columns in one 4-byte store."""
    low = even.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    high = odd.to(gl.int16, bitcast=True).to(gl.int32) << 16
    gl.store(pointer, low | high, mask=inside)
