"""A whole INT4 layer around the tensor-core kernel of int4_mma."""

import torch
import triton
import triton.language as tl

from ...formats import GELU_SHIFT, GROUP_SIZE, STOCK_RULE
from ...layer import Layer, Lora
from ...packing import pack
from ...stages import CodedActivation, Range
from . import verify
from .fragments import Fragments, pack_fragments
from .int4_mma import LARGE, PAIR, SMALL, SMALL_ROWS, WeightOrder, compile_time, int4_mma_kernel
from .low_rank import LowRank, side_by_side

TURING = (7, 5)
QUANTIZE_ROWS = 16  # rows of one program of the quantizer, two groups per warp
# 1.5 * 2**23: adding it to a small float rounds that to the nearest even integer and leaves the integer in its low bits
MAGIC = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["M", "stride", "first_unsigned", "stop_unsigned"])
def quantize_kernel(
    x, smooth, mean, qact, ascales, M, K, stride, first_unsigned, stop_unsigned,
    MEAN: tl.constexpr, SHIFT: tl.constexpr, SIGNED_EXTREME: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Codes and scales of ROWS rows in one group of 64 channels; the rounding of formats/int4.py step by step."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    inside = rows < M
    unsigned = (group >= first_unsigned) & (group < stop_unsigned)
    channel = group * 64 + tl.arange(0, 64)
    values = tl.load(x + rows[:, None].to(tl.int64) * stride + channel[None, :], mask=inside[:, None], other=0.0)
    divisor = tl.load(smooth + channel).to(tl.float32)
    wide = values.to(tl.float32)
    if MEAN:
        wide -= tl.load(mean + channel).to(tl.float32)[None, :]
    wide = tl.where(unsigned, wide + SHIFT, wide)
    wide = tl.div_rn(wide, tl.broadcast_to(divisor[None, :], (ROWS, 64))).to(x.dtype.element_ty).to(tl.float32)
    counted = tl.where(unsigned & (wide < 0.0), 0.0, wide)
    extreme = tl.max(tl.abs(counted), 1)
    spoilt = tl.sum(counted * 0.0, 1)  # a maximum drops NaN; this is NaN where a row has NaN or Inf, else 0
    scale = tl.div_rn(extreme, tl.where(unsigned, 15.0, 7.0) + tl.zeros_like(extreme))
    if SIGNED_EXTREME:
        signed = tl.where(tl.max(counted, 1) >= extreme, -extreme, extreme) * 0.125
        scale = tl.where(unsigned, scale, signed)
    reciprocal = tl.where(scale == 0.0, 0.0, tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale))
    scaled = wide * reciprocal[:, None]
    scaled = tl.minimum(tl.maximum(scaled, tl.where(unsigned, 0.0, -8.0)), tl.where(unsigned, 15.0, 7.0))
    nibbles = (scaled + MAGIC).to(tl.int32, bitcast=True) & 15
    even, odd = tl.split(nibbles.reshape(ROWS, 32, 2))
    byte = group * 32 + tl.arange(0, 32)
    target = qact + rows[:, None].to(tl.int64) * (K // 2) + byte[None, :]
    tl.store(target, (even | (odd << 4)).to(tl.int8), mask=inside[:, None])
    tl.store(ascales + group.to(tl.int64) * M + rows, (scale + spoilt).to(ascales.dtype.element_ty), mask=inside)


def quantize(
    x: torch.Tensor,
    smooth: torch.Tensor,
    act_unsigned: Range,
    rule: str = STOCK_RULE,
    act_mean: torch.Tensor | None = None,
) -> CodedActivation:
    """code = round((x - act_mean + shift) / smooth / scale) as formats/int4.py defines it, with its rules

    x        (M, K), rows may be apart by any stride
    returns  qact (M, K/2) int8 low nibble = even channel, ascales (K/64, M) in the dtype of x
    """
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    qact = x.new_empty(m, k // 2, dtype=torch.int8)
    ascales = x.new_empty(k // GROUP_SIZE, m)
    first, stop = (edge // GROUP_SIZE for edge in act_unsigned)
    grid = (triton.cdiv(m, QUANTIZE_ROWS), k // GROUP_SIZE)
    quantize_kernel[grid](
        x,
        smooth,
        x if act_mean is None else act_mean,
        qact,
        ascales,
        m,
        k,
        x.stride(0),
        first,
        stop,
        MEAN=act_mean is not None,
        SHIFT=GELU_SHIFT,
        SIGNED_EXTREME=rule == "signed_extreme",
        ROWS=QUANTIZE_ROWS,
        num_warps=4,
    )
    return CodedActivation(qact, ascales)


Natural = tuple[torch.Tensor, torch.Tensor]  # qweight (N, K/2) and wscales (K/64, N) of a layer


def int4_gemm(
    act: CodedActivation,
    weight: Fragments | Natural,
    low_rank: LowRank | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    act_unsigned: Range = (0, 0),
) -> torch.Tensor:
    """out = decode(act) @ decode(weight).T + low_rank.act @ low_rank.up.T + bias

    act           qact (M, K/2) int8 in natural order, ascales (K/64, M) in the dtype of out
    act_unsigned  channels whose codes are 0..15; all others are -8..7
    weight        in fragment order, or in natural order with N even
    low_rank      in the dtype of out, or None
    bias          (N,) in the dtype of out, or None
    out           (M, N) float16 or bfloat16 (float16 alone on sm_75); all tensors contiguous
    """
    qact, ascales = act
    m, n = out.shape
    k = 2 * qact.shape[1]
    codes, wscales = (weight.codes, weight.scales) if isinstance(weight, Fragments) else weight
    order = WeightOrder(isinstance(weight, Fragments), wscales.dtype)
    tiling = SMALL if m <= SMALL_ROWS else LARGE
    nothing = out.new_empty(0, dtype=torch.int64)  # stands in for an absent tensor, never read
    int4_mma_kernel[(triton.cdiv(m, tiling.rows) * triton.cdiv(n, tiling.columns),)](
        qact.view(torch.int64),
        ascales,
        codes.view(torch.int64),
        wscales.view(PAIR[wscales.dtype]),
        nothing if low_rank is None else low_rank.act.view(torch.int64),
        nothing if low_rank is None else low_rank.up.view(torch.int64),
        nothing if bias is None else bias.view(torch.int32),
        out.view(torch.int32),
        m,
        n,
        k,
        0 if low_rank is None else low_rank.up.shape[1],
        act_unsigned[0] // GROUP_SIZE,
        act_unsigned[1] // GROUP_SIZE,
        **compile_time(tiling, k, act_unsigned, order, bias is not None, _is_turing(out.device)),
        num_warps=tiling.warps,
    )
    return out


def _is_turing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == TURING


def _check(
    device: torch.device, dtype: torch.dtype, few: bool, order: WeightOrder, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel, exact) for a small product: ragged rows and columns, every part of the epilogue."""
    draw = verify.numbers(device, 0)
    m, n, k = 5 if few else 77, 130, 256
    codes, qweight = (draw(0, 16, rows, k, dtype=torch.uint8) for rows in (m, n))
    ascales = draw(0.1, 0.2, k // GROUP_SIZE, m, dtype=dtype)
    wscales = draw(0.1, 0.2, k // GROUP_SIZE, n, dtype=order.scales)
    low_rank = LowRank(*(draw(-1, 1, rows, 32, dtype=dtype) for rows in (m, n)))
    bias = draw(-1, 1, n, dtype=dtype)
    natural = pack(qweight), wscales
    weight = pack_fragments(*natural) if order.packed else natural
    act_unsigned = {"signed": (0, 0), "unsigned": (0, k), "mixed": (64, 128)}[kind]
    act = CodedActivation(pack(codes), ascales)
    out = int4_gemm(act, weight, low_rank, bias, ascales.new_empty(m, n), act_unsigned)
    signed = ((qweight.int() ^ 8) - 8).double() * wscales.T.double().repeat_interleave(GROUP_SIZE, 1)
    act_codes = codes.int()
    for start, stop in ((0, act_unsigned[0]), (act_unsigned[1], k)):
        act_codes[:, start:stop] = (act_codes[:, start:stop] ^ 8) - 8
    wanted = (act_codes.double() * ascales.T.double().repeat_interleave(GROUP_SIZE, 1)) @ signed.T
    return out, wanted + low_rank.act.double() @ low_rank.up.double().T + bias


def _verify(x: torch.Tensor, order: WeightOrder, layer: Layer) -> None:
    start, stop = layer.spec.act_unsigned
    kind = "signed" if start == stop else "unsigned" if stop - start == layer.spec.k else "mixed"
    variant = (x.device, x.dtype, x.shape[0] <= SMALL_ROWS, order, kind)
    verify.once(variant, lambda: _check(*variant))


def int4_linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: Lora | None,
    fragments: Fragments | None = None,
) -> torch.Tensor:
    """One layer on x (M, K), w4a4; `fragments` is the layer's weight, if it was put in that order before.

    The branch is rounded to the dtype of x between its two factors, as a 16-bit branch is everywhere.
    """
    m, n = x.shape[0], layer.spec.n
    if m == 0:
        return x.new_empty(0, n)
    pairs = [LowRank(x @ layer["proj_down"].to(x.dtype), layer["proj_up"])] if layer.spec.rank else []
    if lora is not None:
        pairs.append(LowRank(x @ lora[0].to(x.dtype), lora[1]))
    low_rank = side_by_side(pairs, x.dtype)
    bias = layer.centred_bias(bias)
    bias = None if bias is None else bias.to(x.dtype)
    if n % 2:  # results are stored in pairs: an odd column gets a partner that is cut off again
        fragments = fragments or pack_fragments(layer["qweight"], layer["wscales"])
        low_rank = None if low_rank is None else low_rank._replace(up=_one_row_more(low_rank.up))
        bias = None if bias is None else _one_row_more(bias)
    natural = layer["qweight"], layer["wscales"]
    out = x.new_empty(m, n + n % 2)
    with torch.cuda.device_of(x):  # a kernel is launched on the current device, whatever its tensors are on
        _verify(x, WeightOrder(fragments is not None, layer["wscales"].dtype), layer)
        mean, spec = layer.tensors.get("act_mean"), layer.spec
        act = quantize(x, layer["smooth_factor"], spec.act_unsigned, spec.act_rule, mean)
        int4_gemm(act, fragments or natural, low_rank, bias, out, spec.act_unsigned)
    return out[:, :n]


def _one_row_more(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, tensor.new_zeros(1, *tensor.shape[1:])))
