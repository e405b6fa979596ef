"""A whole INT4 layer around the tensor-core kernel of int4_mma."""

import torch
from torch.nn.functional import pad

from ...formats import GROUP_SIZE
from ...layer import Layer, Lora
from ...order import ORDERS
from ...packing import pack
from ...stages import CodedActivation, Range, activate
from .. import Run
from ..triton.layers import quantizer
from ..triton.start import Launch
from . import verify
from .int4_mma import (
    LARGE,
    LARGE_TURING,
    PAIR,
    SMALL,
    SMALL_ROWS,
    SMALL_TURING,
    WarpTiling,
    compile_time,
    int4_mma_kernel,
)
from .low_rank import LowRank, beside

TURING = (7, 5)

FRAGMENTS = "fragments"  # the order of bytes that the kernel reads, see kernels/order.py
Weight = tuple[torch.Tensor, torch.Tensor]  # qweight and wscales of a layer


def in_fragments(qweight: torch.Tensor, wscales: torch.Tensor) -> Weight:
    """A weight (N, K/2) with its scales (K/64, N) in natural order as the kernel reads it, N padded to whole tiles"""
    order = ORDERS[FRAGMENTS]
    if missing := -qweight.shape[0] % order.rows:
        qweight, wscales = pad(qweight, (0, 0, 0, missing)), pad(wscales, (0, missing))
    arranged = order.arrange({"qweight": qweight, "wscales": wscales})
    return arranged["qweight"], arranged["wscales"]


class Int4Gemm:
    """out = decode(act) @ decode(weight).T + low_rank.act @ low_rank.up.T + bias, in one of the kernel's tilings

    What is compiled is settled once; no tensor is kept.
    act_unsigned  channels whose codes are 0..15; all others are -8..7
    scales        dtype of wscales
    """

    def __init__(self, tiling: WarpTiling, k: int, act_unsigned: Range, scales: torch.dtype, bias: bool) -> None:
        self.k, self.tiling = k, tiling
        self.behind = tuple(edge // GROUP_SIZE for edge in act_unsigned)
        flags = compile_time(tiling, k, act_unsigned, scales, bias)
        words = (torch.int32, None, torch.int64, PAIR[scales], torch.int64, torch.int64, torch.int32, torch.int32)
        self.launch = Launch(int4_mma_kernel, {**flags, "num_warps": tiling.warps}, words)

    def __call__(
        self,
        act: CodedActivation,
        weight: Weight,
        low_rank: LowRank | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Returns out, see int4_gemm"""
        (qact, ascales), (m, n), tiling = act, out.shape, self.tiling
        if m % 16:  # each row of scales has to start where 16 bytes may be copied from
            ascales = pad(ascales, (0, -m % 16))
        branch_act, up = (weight[0], weight[0]) if low_rank is None else low_rank  # an absent tensor is never read
        tensors = (qact, ascales, *weight, branch_act, up, out if bias is None else bias, out)
        rank = 0 if low_rank is None else up.shape[1]
        grid = (-(-m // tiling.rows) * -(-n // tiling.columns), 1, 1)
        self.launch(grid, tensors, (m, n, self.k, rank, ascales.shape[1], *self.behind))
        return out


def int4_gemm(
    act: CodedActivation,
    weight: Weight,
    low_rank: LowRank | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    act_unsigned: Range = (0, 0),
) -> torch.Tensor:
    """Int4Gemm, for one call

    act           qact (M, K/2) int8 in natural order, ascales (K/64, M) in the dtype of out
    weight        in fragment order, its N padded to whole tiles
    low_rank      in the dtype of out, or None
    bias          (N,) in the dtype of out, or None
    out           (M, N) float16 or bfloat16 (float16 alone on sm_75), N even; all tensors contiguous. Returns out
    """
    tiling, k = tiling_of(out.device, out.shape[0]), 2 * act.qact.shape[1]
    return Int4Gemm(tiling, k, act_unsigned, weight[1].dtype, bias is not None)(act, weight, low_rank, bias, out)


def tiling_of(device: torch.device, m: int) -> WarpTiling:
    """The tiling for M = m, and for all that round up to the same power of two"""
    return ((SMALL_TURING, LARGE_TURING) if _is_turing(device) else (SMALL, LARGE))[m > SMALL_ROWS]


def _is_turing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == TURING


def _check(
    device: torch.device, dtype: torch.dtype, few: bool, scales: torch.dtype, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel, exact) for a small product: ragged rows and columns, every part of the epilogue."""
    draw = verify.numbers(device, 0)
    m, n, k = 5 if few else 77, 144, 256  # of 16 columns like every model: another N would be another kernel
    codes, qweight = (draw(0, 16, rows, k, dtype=torch.uint8) for rows in (m, n))
    ascales = draw(0.1, 0.2, k // GROUP_SIZE, m, dtype=dtype)
    wscales = draw(0.1, 0.2, k // GROUP_SIZE, n, dtype=scales)
    low_rank = LowRank(*(draw(-1, 1, rows, 32, dtype=dtype) for rows in (m, n)))
    bias = draw(-1, 1, n, dtype=dtype)
    weight = in_fragments(pack(qweight), wscales)
    act_unsigned = {"signed": (0, 0), "unsigned": (0, k), "mixed": (64, 128)}[kind]
    act = CodedActivation(pack(codes), ascales)
    out = int4_gemm(act, weight, low_rank, bias, ascales.new_empty(m, n), act_unsigned)
    signed = ((qweight.int() ^ 8) - 8).double() * wscales.T.double().repeat_interleave(GROUP_SIZE, 1)
    act_codes = codes.int()
    for start, stop in ((0, act_unsigned[0]), (act_unsigned[1], k)):
        act_codes[:, start:stop] = (act_codes[:, start:stop] ^ 8) - 8
    wanted = (act_codes.double() * ascales.T.double().repeat_interleave(GROUP_SIZE, 1)) @ signed.T
    return out, wanted + low_rank.act.double() @ low_rank.up.double().T + bias


def _kind(layer: Layer) -> str:
    start, stop = layer.spec.act_unsigned
    return "signed" if start == stop else "unsigned" if stop - start == layer.spec.k else "mixed"


def prepare(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, activation: str) -> Run:
    """What runs such calls in w4a4. A layer that is not in fragment order is put in it for each call."""
    spec, dtype, scales = layer.spec, x.dtype, layer["wscales"].dtype
    variant = (x.device, dtype, x.shape[0] <= SMALL_ROWS, scales, _kind(layer))
    verify.once(variant, lambda: _check(*variant))
    quantize, factors = quantizer(x, layer, spec.format, lora), beside(layer, lora, dtype)
    tiling, has_bias = tiling_of(x.device, x.shape[0]), layer.centred_bias(bias) is not None
    gemm = Int4Gemm(tiling, spec.k, spec.act_unsigned, scales, has_bias)
    n, odd, in_order = spec.n, spec.n % 2, layer.order == FRAGMENTS

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        if not x.shape[0]:
            return x.new_empty(0, n)
        coded, act = quantize(x, layer, lora)
        low_rank = factors(act, layer, lora)
        bias = layer.centred_bias(bias)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        if odd:  # results are stored in pairs: an odd column gets a partner that is cut off again
            low_rank = None if low_rank is None else low_rank._replace(up=_one_row_more(low_rank.up))
            bias = None if bias is None else _one_row_more(bias)
        weight = layer.tensors["qweight"], layer.tensors["wscales"]
        y = gemm(coded, weight if in_order else in_fragments(*weight), low_rank, bias, x.new_empty(x.shape[0], n + odd))
        y = y[:, :n] if odd else y
        return activate(y, activation) if activation else y

    return run


def _one_row_more(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, tensor.new_zeros(1, *tensor.shape[1:])))
