"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), for tests alone. `install()` before a kernel runs.

Each was seen to be wrong in triton 3.6.0 or 3.9.0, on kernels that are right when compiled:

    dot on bf16          multiplies the raw 16-bit patterns; and int8 goes through numpy's slow integer product
    dot_scaled           absent in 3.6, reads E4M3 scales as E8M0 in 3.9
    fma                  rounds twice
    float32 -> bf16, fp8 drop the carry of the rounding or do not round
    range(run-time int)  numpy >= 2.4 does not turn an array of one element into an index (3.6)
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def as_float32(handle) -> np.ndarray:
    """The numbers a tensor handle stands for."""
    kind, data = handle.dtype.scalar, handle.data
    if kind == tl.bfloat16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind == tl.float8e4nv:
        return torch.from_numpy(data.view(np.uint8).copy()).view(torch.float8_e4m3fn).float().numpy()
    return data.astype(np.float32)


def dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """a @ b + d; integers exactly, in float64"""
    if a.dtype.scalar.is_int():
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
    else:
        product = np.matmul(as_float32(a), as_float32(b))
    return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def fma(builder, x, y, z):
    """x * y + z, rounded once"""
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def unpack_e2m1(packed: np.ndarray) -> np.ndarray:
    """(rows, K/2) -> (rows, K), low nibble first"""
    packed = packed.view(np.uint8)
    return np.stack([E2M1[packed & 15], E2M1[packed >> 4]], -1).reshape(packed.shape[0], -1)


def dot_scaled(builder, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, fast_math, lhs_pack, rhs_pack, acc):
    """NVFP4 alone: decode both sides, multiply in float32"""
    left = unpack_e2m1(np.ascontiguousarray(lhs.data))
    right = unpack_e2m1(np.ascontiguousarray(rhs.data.T))
    left = left * as_float32(lhs_scale).repeat(16, 1)
    right = right * as_float32(rhs_scale).repeat(16, 1)
    return interpreter.TensorHandle((left @ right.T + acc.data).astype(np.float32), tl.float32)


def rounding_cast(original):
    """The interpreter's float conversion with torch's rounding where its own is wrong."""
    kinds = {
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
        tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
    }

    def cast(value, source, target, rounding):
        if source == tl.float32 and target in kinds:
            kind, bits, stored = kinds[target]
            numbers = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
            return numbers.to(kind).view(bits).numpy().view(stored).reshape(np.shape(value))
        return original(value, source, target, rounding)

    return cast


def install() -> None:
    """Put every repair in place, once."""
    if interpreter.InterpreterBuilder.create_dot is dot:
        return
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.create_dot_scaled = dot_scaled
    interpreter.InterpreterBuilder.create_fma = fma
    interpreter._convert_float = rounding_cast(interpreter._convert_float)
    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is not None:

        def patch_with_index(tensor, *scope):  # 3.5 has no scope: what it sets, it leaves
            patch(tensor, *scope)
            set_attr = scope[0].set_attr if scope else setattr
            set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

        interpreter._patch_lang_tensor = patch_with_index
