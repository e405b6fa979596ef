"""Device functions: numbers to 4- and 8-bit codes and back. The kernels of this folder are made of these."""

import triton
import triton.language as tl

from ... import formats

# 1.5 * 2**23: floats of this size lie one apart, so adding it rounds to the nearest even integer and leaves that one in
# the low bits, without a conversion; with 1.5 instead of 1 negative integers do not borrow from the exponent
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)  # the bits of MAGIC as a float: MAGIC_BITS + i are those of MAGIC + i
INFINITY_BITS = tl.constexpr(0x7F800000)
SIGN_OFF = tl.constexpr(0x7FFFFFFF)
GELU_SHIFT = tl.constexpr(formats.GELU_SHIFT)  # a kernel sees no globals but such constants


@triton.jit
def round_bits(y):
    """int32 whose low bits are those of round(y), nearest even, for |y| < 2**22"""
    return (y + MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def magnitude_bits(y):
    """The bits of |y| as int32: they order like |y|, with Inf above every number and NaN above Inf"""
    return y.to(tl.int32, bitcast=True) & SIGN_OFF


@triton.jit
def extreme_or_nan(bits):
    """|y| from the largest `magnitude_bits` of a group; NaN where the group holds Inf or NaN, so that nothing hides"""
    return tl.where(bits < INFINITY_BITS, bits, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(scale):
    """1 / scale; 1 for the zero scale of a group of zeros, whose codes are zero either way"""
    return 1.0 / tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def smoothing(smooth_factor, k, mask, ASM: tl.constexpr):
    """1 / smooth_factor of channels k, fp32; by the hardware's approximation (1 ulp) where ASM allows

    .ftz: a factor below 2**-126 counts as zero; to look for one takes six instructions per channel
    """
    factor = tl.load(smooth_factor + k, mask=mask, other=1.0).to(tl.float32)
    if ASM:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [factor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / factor


@triton.jit
def round_up_12_bits(scale):
    """The next float with a 12-bit significand: MAGIC times it is exact, and codes made with it never exceed 127"""
    return ((scale.to(tl.int32, bitcast=True) + 0xFFF) & -0x1000).to(tl.float32, bitcast=True)


@triton.jit
def pairs(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) -> (even columns, odd columns)"""
    return tl.split(tl.reshape(values, (ROWS, COLUMNS // 2, 2)))


@triton.jit
def interleave(even, odd, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Inverse of `pairs`."""
    return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))


@triton.jit
def to_e2m1(y):
    """Nearest E2M1 code, ties to the even code, saturating at 6; int32"""
    a = tl.abs(y)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code | tl.where(y < 0.0, 8, 0)


@triton.jit
def from_e2m1(code):
    """Value of the E2M1 code in the low four bits of an int32: its bits, moved to where fp32 has them, times 2**126"""
    value = ((code & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37
    return tl.where((code & 8) != 0, -value, value)


# Four bytes of codes and their eight values, as by to_e2m1 but for NaN, which becomes 6. What a cvt names first is the
# high nibble, or half. + 0 makes zeros positive; .rn keeps it from being fused with the product before it
E2M1_PAIRS = tl.constexpr(
    "{.reg .f32 even, odd; .reg .b32 both; .reg .b16 low, high; .reg .b8 byte<4>;"
    + "".join(
        f"add.rn.f32 even, ${9 + i}, 0f00000000; add.rn.f32 odd, ${13 + i}, 0f00000000;"
        f"cvt.rn.satfinite.e2m1x2.f32 byte{i}, odd, even; cvt.rn.f16x2.e2m1x2 both, byte{i};"
        f"mov.b32 {{low, high}}, both; cvt.f32.f16 ${1 + i}, low; cvt.f32.f16 ${5 + i}, high;"
        for i in range(4)
    )
    + "mov.b32 $0, {byte0, byte1, byte2, byte3};}"
)


@triton.jit
def to_e2m1_pairs(even, odd, CONVERTS: tl.constexpr):
    """(int8 of two E2M1 codes, the even channel's in the low nibble, their values); by cvt where the GPU CONVERTS"""
    if CONVERTS:
        return tl.inline_asm_elementwise(
            E2M1_PAIRS,
            "=r,=f,=f,=f,=f,=f,=f,=f,=f,f,f,f,f,f,f,f,f",
            [even, odd],
            dtype=(tl.int8, tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = to_e2m1(even), to_e2m1(odd)
        return (low | (high << 4)).to(tl.int8), from_e2m1(low), from_e2m1(high)


@triton.jit
def from_e4m3(byte):
    """Value of an E4M3 byte held in an int32, by its bits: pointers to fp8 do not exist before sm_89"""
    value = ((byte & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    return tl.where((byte & 128) != 0, -value, value)


@triton.jit
def gelu(v):
    """GELU, tanh form: v * sigmoid(2 z), z = sqrt(2 / pi) (v + 0.044715 v**3)"""
    return v / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))


@triton.jit
def silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def low_nibbles(b, ASM: tl.constexpr):
    """16 * signed low nibble, int8. Four bytes at once: byte-wise shifts would be unrolled one by one"""
    if ASM:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0;}",
            "=r,r",
            [b],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return b << 4


@triton.jit
def high_nibbles(b, ASM: tl.constexpr):
    """16 * signed high nibble, int8"""
    if ASM:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [b], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return b & -16


@triton.jit
def low_nibbles_unsigned(b, ASM: tl.constexpr):
    """Unsigned low nibble, int8"""
    if ASM:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [b], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return b & 15


@triton.jit
def high_nibbles_unsigned(b, ASM: tl.constexpr):
    """Unsigned high nibble, int8"""
    if ASM:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F;}",
            "=r,r",
            [b],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return (b >> 4) & 15
