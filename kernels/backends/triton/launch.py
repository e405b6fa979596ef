"""Host side of the kernels: outputs, tile sizes, one launch. Tensors are right already; nothing is checked here."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...formats import E2M1_CODE, FORMATS, GROUP_SIZE, OFFSET_8, Format, Tensors
from ...layer import RANK_TILE, shifted_bias_term
from ...stages import CodedActivation, Coding, Range, weighted
from . import knows
from .expand_weight import expand_weight
from .gemm_nvfp4 import gemm_nvfp4
from .gemm_w4 import gemm_w4
from .gemm_w8 import gemm_w8
from .gemv_w4a16 import gemv_w4a16
from .quantize_groups import quantize_groups
from .quantize_nvfp4 import quantize_nvfp4
from .quantize_rows import quantize_rows
from .tiles import arch_of, has_asm, settings

ACTIVATIONS = {"": 0, "gelu": 1, "silu": 2}
FUSED_RANK = 128  # wider branches go through torch.mm: their sums would not stay in registers
STEP = 64  # input channels that a program of a quantizing kernel reads at a time


@dataclass(frozen=True)
class Epilogue:
    """act(product + branch_act @ proj_up.T + (lora_act * strength of RANK_TILE columns) @ lora_up.T + bias)

    branch_act, lora_act  (M, R) and (M, R') contiguous, or None
    lora_strength         (ceil(R' / RANK_TILE),) float32, or None
    activation            a key of ACTIVATIONS
    """

    branch_act: torch.Tensor | None = None
    proj_up: torch.Tensor | None = None
    lora_act: torch.Tensor | None = None
    lora_up: torch.Tensor | None = None
    lora_strength: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    activation: str = ""

    def pointers(self, unused: torch.Tensor) -> list[torch.Tensor]:
        """The kernel's six pointers; `unused` where there is nothing to read."""
        parts = (self.branch_act, self.proj_up, self.lora_act, self.lora_up, self.lora_strength, self.bias)
        return [unused if part is None else part for part in parts]

    def weighted_lora(self) -> torch.Tensor | None:
        """lora_act * strength of RANK_TILE columns, for products that have no place for the strength"""
        return None if self.lora_act is None else weighted(self.lora_act, self.lora_strength)

    def widths(self) -> tuple[int, int]:
        """(R, R')"""
        branch, lora = self.branch_act, self.lora_act
        return 0 if branch is None else branch.shape[1], 0 if lora is None else lora.shape[1]

    def flags(self) -> dict[str, Any]:
        return {
            "STRENGTH": self.lora_strength is not None,
            "BIAS": self.bias is not None,
            "ACTIVATION": ACTIVATIONS[self.activation],
        }


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def split_branch(
    x: torch.Tensor, proj_down: torch.Tensor | None, fuse: bool
) -> tuple[torch.Tensor, int, torch.Tensor | None]:
    """(proj_down, its padded rank, empty branch_act) where the quantizing kernel is to make branch_act = x @ proj_down

    else (x, 0, branch_act): x stands in for a pointer that is not read, branch_act is finished, or None without branch
    """
    if proj_down is None or not proj_down.shape[1]:
        return x, 0, None
    rank = proj_down.shape[1]
    if not fuse or rank > FUSED_RANK:
        return x, 0, x @ proj_down.to(x.dtype)
    return proj_down, max(RANK_TILE, triton.next_power_of_2(rank)), x.new_empty(x.shape[0], rank)


def quantize(
    x: torch.Tensor,
    smooth_factor: torch.Tensor | None,
    proj_down: torch.Tensor | None,
    coding: Coding,
    act_mean: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(qact, ascales, branch_act) of x (M, K), see stages.quantize_activation; branch_act is None without proj_down

    act_mean and the rule of `coding` count for 4-bit codes alone
    """
    codes, unsigned, rule = coding
    if x.stride(-1) != 1:
        x = x.contiguous()
    if codes in ("int8_row", "fp8_row"):
        return _quantize_rows(x, smooth_factor, proj_down, codes == "fp8_row", unsigned)
    m, k = x.shape
    fmt = FORMATS.get(codes)
    nvfp4, eight = fmt is not None and fmt.code == E2M1_CODE, fmt is None
    name = "quantize_nvfp4" if nvfp4 else "quantize_groups"
    options = settings(name, x.device, m)
    chunks = options.pop("CHUNKS")
    down, rank, branch_act = split_branch(x, proj_down, not chunks)
    qact = x.new_empty(m, k if eight else k // 2, dtype=torch.int8)
    kind = torch.float8_e4m3fn if nvfp4 else torch.float32 if eight else x.dtype
    ascales = x.new_empty(k // (GROUP_SIZE if fmt is None else fmt.group_size), m, dtype=kind)
    if not m:
        return qact, ascales, branch_act
    steps = triton.cdiv(k, STEP)
    each = chunks or steps
    grid = (triton.cdiv(m, options["BM"]), triton.cdiv(steps, each))
    tensors = (
        x,
        x if smooth_factor is None else smooth_factor,
        x if act_mean is None else act_mean,
        down,
        qact,
        ascales,
        branch_act if rank else x,
    )
    sizes = (m, k, down.shape[1] if rank else 0, x.stride(0))
    flags = {"RANK": rank, "SMOOTH": smooth_factor is not None, "ASM": has_asm(arch_of(x.device)), **options}
    flags["MEAN"] = act_mean is not None and not eight
    with on_device_of(x):
        if nvfp4:
            quantize_nvfp4[grid](*tensors, *sizes, each, FOUR_SIX=rule == "four_six", **flags)
        else:
            quantize_groups[grid](
                *tensors,
                *sizes,
                *unsigned,
                each,
                EIGHT=eight,
                UNSIGNED=unsigned[0] != unsigned[1],
                SIGNED_EXTREME=rule == "signed_extreme" and not eight,
                **flags,
            )
    return qact, ascales, branch_act


def _quantize_rows(
    x: torch.Tensor, smooth_factor: torch.Tensor | None, proj_down: torch.Tensor | None, fp8: bool, unsigned: Range
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    m, k = x.shape
    options = settings("quantize_rows", x.device, m)
    down, rank, branch_act = split_branch(x, proj_down, options.pop("FUSE"))
    qact = x.new_empty(m, k, dtype=torch.float8_e4m3fn if fp8 else torch.int8)
    ascales = x.new_empty(m, dtype=torch.float32)
    if m:
        tensors = (
            x,
            x if smooth_factor is None else smooth_factor,
            down,
            qact,
            ascales,
            branch_act if rank else x,
        )
        sizes = (m, k, down.shape[1] if rank else 0, x.stride(0), *unsigned)
        with on_device_of(x):
            quantize_rows[(triton.cdiv(m, options["BM"]),)](
                *tensors,
                *sizes,
                RANK=rank,
                SMOOTH=smooth_factor is not None,
                FP8=fp8,
                UNSIGNED=unsigned[0] != unsigned[1],
                ASM=has_asm(arch_of(x.device)),
                **options,
            )
    return qact, ascales, branch_act


def _grid(m: int, n: int, options: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(m, options["BM"]) * triton.cdiv(n, options["BN"]),)


def multiply_w4(
    act: CodedActivation,
    weight: Tensors,
    epilogue: Epilogue,
    unsigned: Range,
    dtype: torch.dtype,
    next_smooth: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """(y,) = epilogue(decode(act) @ decode(weight).T), weight in 4 bit, act in 4 or 8

    weight       qweight and wscales of a layer
    unsigned     channels whose 4-bit codes are 0..15
    next_smooth  (N,) smooth_factor of a next layer: then (y, qact, ascales), its unsigned codes of y + GELU_SHIFT
    """
    (qact, ascales), qweight = act, weight["qweight"]
    (m, width), (n, half) = qact.shape, qweight.shape
    eight = width == 2 * half
    out = qact.new_empty(m, n, dtype=dtype)
    requantized: tuple[torch.Tensor, ...] = ()
    if next_smooth is not None:
        requantized = qact.new_empty(m, n // 2), qact.new_empty(n // GROUP_SIZE, m, dtype=dtype)
    if m:
        options = settings("gemm_w4", qact.device, m)
        with on_device_of(qact):
            gemm_w4[_grid(m, n, options)](
                qact,
                qweight,
                ascales,
                weight["wscales"],
                *epilogue.pointers(out),
                out,
                *((next_smooth, *requantized) if requantized else (out, out, out)),
                m,
                n,
                2 * half,
                *epilogue.widths(),
                *unsigned,
                EIGHT=eight,
                # MAGIC * scale is exact up to 22 significant bits: scales of int8 codes have 12 (round_up_12_bits),
                # fp16 has 11 and bf16 8; those of fp32 activations have 24 and take the longer way
                FOLD=eight or ascales.element_size() == 2,
                REQUANTIZE=bool(requantized),
                ASM=has_asm(arch_of(qact.device)),
                **epilogue.flags(),
                **options,
            )
    return out, *requantized


def multiply_w8(
    act: CodedActivation,
    weight: torch.Tensor,
    row_scales: torch.Tensor,
    epilogue: Epilogue,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y = epilogue((qact @ weight.T) * ascales[:, None] * row_scales), int8 rows (N, K) with scales (N,) float32"""
    qact, ascales = act
    (m, k), n = qact.shape, weight.shape[0]
    out = qact.new_empty(m, n, dtype=dtype)
    if m:
        options = settings("gemm_w8", qact.device, m)
        tensors = (qact, weight, ascales, row_scales, *epilogue.pointers(out), out)
        with on_device_of(qact):
            gemm_w8[_grid(m, n, options)](
                *tensors, m, n, k, *epilogue.widths(), EVEN=k % options["BK"] == 0, **epilogue.flags(), **options
            )
    return out


def multiply_nvfp4(act: CodedActivation, weight: Tensors, epilogue: Epilogue, dtype: torch.dtype) -> torch.Tensor:
    """y = epilogue(decode(act) @ decode(weight).T), NVFP4 codes on both sides

    weight  qweight and wscales of a layer, and wtscale and wcscales if it has them
    """
    (qact, ascales), qweight = act, weight["qweight"]
    m, n, k = qact.shape[0], qweight.shape[0], 2 * qweight.shape[1]
    out = qact.new_empty(m, n, dtype=dtype)
    if m:
        options = settings("gemm_nvfp4", qact.device, m)
        codes = (qact.view(torch.uint8), qweight.view(torch.uint8))
        channel_scales = channel_scales_of(weight)
        if channel_scales is None:
            channel_scales = ascales.new_ones(n, dtype=torch.float32)
        tensors = (*codes, ascales, weight["wscales"], channel_scales, *epilogue.pointers(out), out)
        with on_device_of(qact):
            gemm_nvfp4[_grid(m, n, options)](
                *tensors, m, n, k, *epilogue.widths(), EVEN=k % options["BK"] == 0, **epilogue.flags(), **options
            )
    return out


def expand(
    format: str,
    tensors: Tensors,
    dtype: torch.dtype,
    channel_scales: torch.Tensor | None = None,
    smooth_factor: torch.Tensor | None = None,
    unsigned: Range = (0, 0),
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W = weight * row_scales[:, None] for int8 and fp8; W / smooth_factor = weight for 16 bit

    returns  (weight (N, K), row_scales (N,)), or (weight, shift (N,) or None): what a layer that does not shift its
             activations owes its bias
    """
    qweight, wscales = tensors["qweight"], tensors["wscales"]
    n, k = qweight.shape[0], 2 * qweight.shape[1]
    fmt = FORMATS[format]
    if not knows(fmt):
        return _expand_elsewhere(fmt, tensors, dtype, smooth_factor, unsigned)
    unit, nvfp4 = fmt.units.get(dtype, 0), fmt.code == E2M1_CODE
    weight = qweight.new_empty(n, k, dtype=dtype)
    shifted = not unit and unsigned[0] != unsigned[1]
    beside = qweight.new_empty(n, dtype=torch.float32) if unit or shifted else None
    options = settings("expand_weight", qweight.device, n)
    options["GROUPS"] = options.pop("BYTES") // (8 if nvfp4 else 32)
    unused = beside if beside is not None else weight
    with on_device_of(qweight):
        expand_weight[(triton.cdiv(n, options["BN"]),)](
            qweight,
            wscales.view(torch.uint8) if nvfp4 else wscales,
            tensors.get("wzeros", wscales.view(torch.uint8) if nvfp4 else wscales),
            unused if channel_scales is None else channel_scales,
            unused if smooth_factor is None else smooth_factor,
            weight,
            unused,
            unused,
            n,
            k,
            *unsigned,
            NVFP4=nvfp4,
            AWQ=fmt.code == OFFSET_8,
            UNIT=unit,
            CHANNEL=channel_scales is not None,
            SMOOTH=smooth_factor is not None,
            SHIFT=shifted,
            **options,
        )
    return weight, beside


def _expand_elsewhere(
    fmt: Format,
    tensors: Tensors,
    dtype: torch.dtype,
    smooth_factor: torch.Tensor | None,
    unsigned: Range,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`expand` by the format's own code: a format that no kernel reads still runs on those for expanded weights"""
    if dtype in fmt.units:
        return fmt.expand_rows(tensors, dtype)
    weight = fmt.decode_weight(tensors)
    if smooth_factor is None:
        return weight.to(dtype), None
    shift = shifted_bias_term(weight, smooth_factor, unsigned) if unsigned[0] != unsigned[1] else None
    return (weight / smooth_factor.float()).to(dtype), shift


def multiply_gemv(
    x: torch.Tensor, qweight: torch.Tensor, wscales: torch.Tensor, wzeros: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """y = x @ decode(weight).T + bias, 4-bit weights with zeros, 16-bit activations"""
    if x.stride(-1) != 1:
        x = x.contiguous()
    m, n, k = x.shape[0], qweight.shape[0], 2 * qweight.shape[1]
    out = x.new_empty(m, n)
    if m:
        options = settings("gemv_w4a16", x.device, m)
        grid = (triton.cdiv(n, options["BN"]), triton.cdiv(m, options["BM"]))
        with on_device_of(x):
            gemv_w4a16[grid](
                x,
                qweight,
                wscales,
                wzeros,
                out if bias is None else bias,
                out,
                m,
                n,
                k,
                x.stride(0),
                BIAS=bias is not None,
                **options,
            )
    return out


def channel_scales_of(tensors: Tensors) -> torch.Tensor | None:
    """wtscale * wcscales, (N,) float32; None when the layer has neither"""
    scales = [tensors[name].float() for name in ("wtscale", "wcscales") if name in tensors]
    if not scales:
        return None
    n = tensors["qweight"].shape[0]
    return (scales[0] * scales[1] if len(scales) == 2 else scales[0]).expand(n).contiguous()
