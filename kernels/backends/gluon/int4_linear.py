"""A whole INT4 layer around the tensor-core kernel of int4_mma."""

import torch
from torch.nn.functional import pad

from ...formats import GROUP_SIZE
from ...layer import Layer, Lora
from ...order import ORDERS
from ...packing import pack
from ...stages import CodedActivation, Range
from ..triton.layers import Quantize, quantizer
from ..triton.start import Launch
from . import verify
from .int4_mma import LARGE, LARGE_TURING, PAIR, SMALL, SMALL_ROWS, SMALL_TURING, compile_time, int4_mma_kernel
from .low_rank import LowRank, side_by_side

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


def int4_gemm(
    act: CodedActivation,
    weight: Weight,
    low_rank: LowRank | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    act_unsigned: Range = (0, 0),
) -> torch.Tensor:
    """out = decode(act) @ decode(weight).T + low_rank.act @ low_rank.up.T + bias

    act           qact (M, K/2) int8 in natural order, ascales (K/64, M) in the dtype of out
    act_unsigned  channels whose codes are 0..15; all others are -8..7
    weight        in fragment order, its N padded to whole tiles
    low_rank      in the dtype of out, or None
    bias          (N,) in the dtype of out, or None
    out           (M, N) float16 or bfloat16 (float16 alone on sm_75), N even; all tensors contiguous
    """
    qact, ascales = act
    m, n = out.shape
    k = 2 * qact.shape[1]
    codes, wscales = weight
    if m % 16:  # each row of scales has to start where 16 bytes may be copied from
        ascales = pad(ascales, (0, -m % 16))
    tilings = (SMALL_TURING, LARGE_TURING) if _is_turing(out.device) else (SMALL, LARGE)
    tiling = tilings[m > SMALL_ROWS]
    nothing = out.new_empty(0, dtype=torch.int64)  # stands in for an absent tensor, never read
    tensors = (
        qact.view(torch.int32),
        ascales,
        codes.view(torch.int64),
        wscales.view(PAIR[wscales.dtype]),
        nothing if low_rank is None else low_rank.act.view(torch.int64),
        nothing if low_rank is None else low_rank.up.view(torch.int64),
        nothing if bias is None else bias.view(torch.int32),
        out.view(torch.int32),
    )
    rank = 0 if low_rank is None else low_rank.up.shape[1]
    flags = compile_time(tiling, k, act_unsigned, wscales.dtype, bias is not None)
    grid = (-(-m // tiling.rows) * -(-n // tiling.columns), 1, 1)
    numbers = (m, n, k, rank, ascales.shape[1], *(edge // GROUP_SIZE for edge in act_unsigned))
    Launch(int4_mma_kernel, {**flags, "num_warps": tiling.warps})(grid, tensors, numbers)
    return out


def _is_turing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == TURING


def _check(
    device: torch.device, dtype: torch.dtype, few: bool, scales: torch.dtype, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel, exact) for a small product: ragged rows and columns, every part of the epilogue."""
    draw = verify.numbers(device, 0)
    m, n, k = 5 if few else 77, 130, 256
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


def _verify(x: torch.Tensor, layer: Layer) -> None:
    start, stop = layer.spec.act_unsigned
    kind = "signed" if start == stop else "unsigned" if stop - start == layer.spec.k else "mixed"
    variant = (x.device, x.dtype, x.shape[0] <= SMALL_ROWS, layer["wscales"].dtype, kind)
    verify.once(variant, lambda: _check(*variant))


def int4_linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: Lora | None,
    quantize: Quantize | None = None,
) -> torch.Tensor:
    """One layer on x (M, K), w4a4. A layer that is not in fragment order is put in it for the call.

    The branch is rounded to the dtype of x between its two factors, as a 16-bit branch is everywhere.
    quantize  `quantizer` of such calls, else it is made
    """
    m, n = x.shape[0], layer.spec.n
    if m == 0:
        return x.new_empty(0, n)
    with torch.cuda.device_of(x):  # a kernel is launched on the current device, whatever its tensors are on
        _verify(x, layer)
        act, branch_act = (quantize or quantizer(x, layer, layer.spec.format))(x, layer)
        pairs = [] if branch_act is None else [LowRank(branch_act, layer["proj_up"])]
        if lora is not None:
            pairs.append(LowRank(x @ lora[0].to(x.dtype), lora[1]))
        low_rank = side_by_side(pairs, x.dtype)
        bias = layer.centred_bias(bias)
        bias = None if bias is None else bias.to(x.dtype)
        if n % 2:  # results are stored in pairs: an odd column gets a partner that is cut off again
            low_rank = None if low_rank is None else low_rank._replace(up=_one_row_more(low_rank.up))
            bias = None if bias is None else _one_row_more(bias)
        weight = layer["qweight"], layer["wscales"]
        if layer.order != FRAGMENTS:
            weight = in_fragments(*weight)
        out = x.new_empty(m, n + n % 2)
        int4_gemm(act, weight, low_rank, bias, out, layer.spec.act_unsigned)
    return out[:, :n]


def _one_row_more(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, tensor.new_zeros(1, *tensor.shape[1:])))
