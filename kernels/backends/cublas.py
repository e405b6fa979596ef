"""torch._scaled_mm: cuBLASLt's NVFP4 product, and fp8 where Triton is not there to feed the same product.

    w4a4  y = (x codes @ weight codes.T, both e2m1 with one e4m3 scale per 16) * channel scales + branch + LoRA + bias
    fp8   y = (x e4m3 @ weight e4m3.T) * ascales[:, None] * row_scales + branch + LoRA + bias

It is a rival: it runs where it was measured to be the fastest (kernels/rivals.py), never because a table says so.

cuBLASLt reads scales in tiles of 128 rows by 4 groups: byte 16 (row % 32) + 4 (row / 32) + group of 512, tiles of one
stretch of rows side by side. Source: NVIDIA cuBLAS, "1D block scaling factors layout". A layer's scales are put so for
each call: an eighth of the bytes of its codes, of which the host would not know if they were kept.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)

from .. import stages
from ..formats import E2M1_CODE
from ..layer import Layer, Lora
from . import Backend, KernelCall, Run, triton, with_epilogue
from .triton import versions

CLAIM = -1  # below the reference: whoever calls it has measured it
SIXTEEN = (torch.bfloat16, torch.float16)
FP4 = "float4_e2m1fn_x2"  # torch 2.8 and newer
FP4_GPUS = (10, 12)  # compute capability 10.x and 12.x
FP4_CUDA = (12, 8)
FP8_GPUS = (8, 9), (10, 3)  # first and last with scales per row
TILE_ROWS, TILE_GROUPS = 128, 4  # of a tile of scales
SIDE = 16  # N, and the bytes of a row, are multiples of it

Quantize = Callable[[torch.Tensor, Layer, Lora | None], tuple[stages.CodedActivation, torch.Tensor | None]]


def claims(call: KernelCall) -> int | str:
    """Calls that were measured, where torch has the product."""
    if not call.measured:
        return "runs where it was measured to be the fastest: see compute=measured and `python -m quantize tune`"
    if call.compute == "w4a4" and call.fmt.code == E2M1_CODE:
        return _lacks_fp4(call) or CLAIM
    if call.compute == "fp8" and torch.float8_e4m3fn in call.fmt.units:
        return _lacks_fp8(call) or CLAIM
    return f"multiplies NVFP4 codes and fp8, not {call.compute} of {call.format}"


def _lacks_fp4(call: KernelCall) -> str | None:
    if call.capability is None or call.capability[0] not in FP4_GPUS:
        return f"NVFP4 tensor cores need compute capability 10.x or 12.x, this is {call.arch}"
    if call.dtype not in SIXTEEN:
        return f"computes in bf16 or fp16, not {call.dtype}"
    if not hasattr(torch, FP4) or not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no {FP4}, 2.8 and newer have"
    cuda = torch.version.cuda
    if cuda is None or tuple(map(int, cuda.split(".")[:2])) < FP4_CUDA:
        return f"cuBLASLt has NVFP4 from CUDA 12.8 on, this torch is made with {cuda}"
    return None


def _lacks_fp8(call: KernelCall) -> str | None:
    if call.device.type == "cpu":
        return on_cpu() if call.asked else "multiplies fp8 on a CPU only where that is asked for by name"
    if call.capability is None or not FP8_GPUS[0] <= call.capability <= FP8_GPUS[1]:
        return f"fp8 with scales per row needs compute capability 8.9 to 10.3, this is {call.arch}"
    if call.dtype not in SIXTEEN:
        return f"computes in bf16 or fp16, not {call.dtype}"
    return None if versions.missing() else "is the product in Triton's fp8 already, which quantizes faster"


@cache
def on_cpu() -> str | None:
    """Why torch multiplies no fp8 with scales per row on this CPU, or None."""
    one, scale = torch.ones(SIDE, SIDE).to(torch.float8_e4m3fn), torch.full((SIDE, 1), 0.5)
    try:
        y = torch._scaled_mm(one, one.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.float32)
    except (AttributeError, RuntimeError, ValueError) as error:
        return f"torch multiplies no fp8 on a CPU: {str(error).splitlines()[0]}"
    return None if bool((y == SIDE / 4).all()) else "torch's fp8 product is not right on this CPU"


def tiled(words: torch.Tensor) -> torch.Tensor:
    """(R, C) int32, four e4m3 scales of a row each -> the same scales in cuBLASLt's order, flat, rows filled up to 128

    >>> words = torch.arange(256, dtype=torch.int32)[:, None]
    >>> tiled(words).view(torch.int32)[:6]  # the rows that share a line
    tensor([ 0, 32, 64, 96,  1, 33], dtype=torch.int32)
    """
    missing = -words.shape[0] % TILE_ROWS
    if missing:
        words = F.pad(words, (0, 0, 0, missing))
    tiles = words.unflatten(0, (-1, TILE_GROUPS, TILE_ROWS // TILE_GROUPS))
    return tiles.permute(0, 3, 2, 1).contiguous().view(torch.float8_e4m3fn).flatten()


def words_of(scales: torch.Tensor) -> torch.Tensor:
    """(R, ceil(G/4)) int32 of scales (G, R) e4m3, one per group and row; groups that are none are zero"""
    by_row = scales.view(torch.uint8).t()
    missing = -by_row.shape[1] % TILE_GROUPS
    if missing:
        return F.pad(by_row, (0, missing)).view(torch.int32)
    if by_row.stride(1) != 1 or by_row.stride(0) % TILE_GROUPS:
        by_row = by_row.contiguous()
    return by_row.view(torch.int32)


def _quantizer(x: torch.Tensor, layer: Layer, codes: str, lora: Lora | None) -> Quantize:
    """Triton's where that can run, else torch's own steps"""
    if codes == layer.spec.format and versions.missing() is None and (x.is_cuda or triton.interpreted()):
        from .triton import layers

        return layers.quantizer(x, layer, codes, lora)
    coding = stages.Coding(codes, layer.spec.act_unsigned, layer.spec.act_rule)

    def run(x: torch.Tensor, layer: Layer, lora: Lora | None) -> tuple[stages.CodedActivation, torch.Tensor | None]:
        tensors = layer.tensors
        mean = tensors.get("act_mean") if codes == layer.spec.format else None
        smooth, down = tensors["smooth_factor"], tensors.get("proj_down")
        qact, ascales, act = stages.quantize_activation(x, smooth, down, coding, mean)
        if lora is not None:
            wide = x if x.is_cuda else x.float()
            act = torch.cat((act, wide @ lora.down.to(wide.dtype)), 1)
        return stages.CodedActivation(qact, ascales), act if act.shape[1] else None

    return run


def _nvfp4(x: torch.Tensor, layer: Layer, lora: Lora | None) -> Run:
    dtype, quantize = getattr(torch, FP4), _quantizer(x, layer, layer.spec.format, lora)

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        (qact, ascales), act = quantize(x, layer, lora)
        # Triton leaves the four scales of 64 channels side by side
        words = words_of(ascales) if ascales.dim() == 2 else ascales.view(torch.int32)[..., 0].t()
        y = torch._scaled_mm(
            qact.view(dtype),
            layer["qweight"].view(dtype).t(),
            scale_a=tiled(words),
            scale_b=tiled(words_of(layer["wscales"])),
            out_dtype=torch.bfloat16,  # its range: the scales of the whole tensor are not in it yet
        )
        y *= stages.channel_scales_of(layer.tensors)
        return _finished(y.to(x.dtype), layer, act, layer.centred_bias(bias), lora)

    return run


def _fp8(x: torch.Tensor, layer: Layer, lora: Lora | None) -> Run:
    quantize, dtype = _quantizer(x, layer, "fp8_row", lora), torch.bfloat16 if x.is_cuda else torch.float32

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        (qact, ascales), act = quantize(x, layer, lora)
        weight, row_scales = layer.spec.fmt.expand_rows(layer.tensors, torch.float8_e4m3fn)
        y = torch._scaled_mm(qact, weight.t(), scale_a=ascales[:, None], scale_b=row_scales[None], out_dtype=dtype)
        return _finished(y.to(x.dtype) if x.is_cuda else y, layer, act, bias, lora).to(x.dtype)

    return run


def _finished(
    y: torch.Tensor, layer: Layer, act: torch.Tensor | None, bias: torch.Tensor | None, lora: Lora | None
) -> torch.Tensor:
    """y + act @ [proj_up | lora.up].T + bias, in place of y and in its dtype; act = x @ [proj_down | lora.down]"""
    first = 0
    for up in (layer.tensors.get("proj_up"), None if lora is None else lora.up):
        if act is not None and up is not None:
            y.addmm_(act[:, first : first + up.shape[1]].to(y.dtype), up.to(y.dtype).t())
            first += up.shape[1]
    if bias is not None:
        y += bias.to(y.dtype)
    return y


def prepare(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, compute: str, activation: str
) -> Run:
    """What runs calls like this one. Raises ValueError for a layer that torch does not multiply."""
    spec = layer.spec
    four = compute == "w4a4"
    if spec.n % SIDE or (spec.k // 2 if four else spec.k) % SIDE:
        raise ValueError(f"torch._scaled_mm needs N to be a multiple of 16 and K of 32, this is {spec.where}")
    run = _nvfp4(x, layer, lora) if four else _fp8(x, layer, lora)

    def linear(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        return run(x.contiguous(), layer, bias, lora) if x.shape[0] else x.new_empty(0, layer.spec.n)

    return with_epilogue(linear, activation)


BACKEND = Backend("cublas", claims, prepare)
