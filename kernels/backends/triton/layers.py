"""A whole layer in each compute mode: the launches, in order."""

from dataclasses import dataclass, replace

import torch

from ...formats import E2M1_CODE
from ...layer import Layer, Lora
from ...stages import CodedActivation, Coding, activate
from ...weight_cache import WeightCache
from . import launch
from .launch import Epilogue

KEPT = 0.5  # of a GPU's free memory, for weights that w8a8 keeps expanded


@dataclass(frozen=True)
class Work:
    """One call: x (M, K), the layer, and the epilogue without branch_act, which comes out of the quantization."""

    x: torch.Tensor
    layer: Layer
    epilogue: Epilogue

    @property
    def proj_down(self) -> torch.Tensor | None:
        return self.layer["proj_down"] if self.layer.spec.rank else None

    def quantize(self, codes: str) -> tuple[CodedActivation, Epilogue]:
        """(x in codes, epilogue with branch_act)"""
        qact, ascales, branch_act = quantized(self.x, self.layer, codes)
        return CodedActivation(qact, ascales), replace(self.epilogue, branch_act=branch_act)


def quantized(x: torch.Tensor, layer: Layer, codes: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(qact, ascales, x @ proj_down) of x (M, K); codes as in stages.quantize_activation"""
    spec, tensors = layer.spec, layer.tensors
    coding = Coding(codes, spec.act_unsigned, spec.act_rule)
    return launch.quantize(x, tensors["smooth_factor"], tensors.get("proj_down"), coding, tensors.get("act_mean"))


def w4a4(work: Work) -> torch.Tensor:
    layer, x = work.layer, work.x
    act, epilogue = work.quantize(layer.spec.format)
    epilogue = replace(epilogue, bias=layer.centred_bias(epilogue.bias))
    if layer.spec.fmt.code == E2M1_CODE:
        return launch.multiply_nvfp4(act, layer.tensors, epilogue, x.dtype)
    return launch.multiply_w4(act, layer.tensors, epilogue, layer.spec.act_unsigned, x.dtype)[0]


def w4a8(work: Work) -> torch.Tensor:
    act, epilogue = work.quantize("int8_group")
    # 8-bit codes have a sign bit to spare: the shift is in them, unsigned codes are not needed
    return launch.multiply_w4(act, work.layer.tensors, epilogue, (0, 0), work.x.dtype)[0]


def expanded(layer: Layer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """W = weight * row_scales[:, None]. torch's allocator hands out the same scratch memory for each call"""
    scales = launch.channel_scales_of(layer.tensors)
    weight, row_scales = launch.expand(layer.spec.format, layer.tensors, dtype, scales)
    assert row_scales is not None  # every 8-bit dtype of a format has them
    return weight, row_scales


def w4a8_jit(work: Work) -> torch.Tensor:
    act, epilogue = work.quantize("int8_row")
    return launch.multiply_w8(act, *expanded(work.layer, torch.int8), epilogue, work.x.dtype)


_kept: dict[torch.device, WeightCache[tuple[torch.Tensor, torch.Tensor]]] = {}


def kept_weight(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """`expanded`, kept while the layer's own bytes are where they are, as far as there is room"""
    layer, x = work.layer, work.x
    if x.device not in _kept:
        _kept[x.device] = WeightCache(lambda: _may_keep(x.device))
    size = layer.spec.n * layer.spec.k
    variant = (layer.spec.format, "int8")
    return _kept[x.device].get(layer["qweight"], variant, lambda: expanded(layer, torch.int8), size)


def w8a8(work: Work) -> torch.Tensor:
    """The same bytes as w4a8_jit, kept"""
    weight = kept_weight(work)
    act, epilogue = work.quantize("int8_row")
    return launch.multiply_w8(act, *weight, epilogue, work.x.dtype)


def _may_keep(device: torch.device) -> int:
    """Bytes of expanded weights in all that this device has room for now"""
    if device.type != "cuda":
        return 1 << 30
    free, _ = torch.cuda.mem_get_info(device)
    return int(KEPT * (free + _kept[device].nbytes))


def fp8(work: Work) -> torch.Tensor:
    """The product by torch, which has its own row scales; the epilogue follows it"""
    (qact, ascales), epilogue = work.quantize("fp8_row")
    if not work.x.shape[0]:
        return work.x.new_empty(0, work.layer.spec.n)
    weight, row_scales = expanded(work.layer, torch.float8_e4m3fn)
    y = torch._scaled_mm(qact, weight.t(), scale_a=ascales[:, None], scale_b=row_scales[None], out_dtype=torch.bfloat16)
    return finished(y.to(work.x.dtype), epilogue)


def w16(work: Work) -> torch.Tensor:
    """x @ (decode(qweight) / smooth_factor).T: smoothing goes into the expanded weight, the shift into the bias"""
    x, layer = work.x, work.layer
    tensors, unsigned = layer.tensors, layer.spec.act_unsigned
    weight, shift = launch.expand(
        layer.spec.format, tensors, x.dtype, launch.channel_scales_of(tensors), tensors.get("smooth_factor"), unsigned
    )
    epilogue = work.epilogue
    if shift is not None:
        bias = shift if epilogue.bias is None else epilogue.bias.float() + shift
        epilogue = replace(epilogue, bias=bias.to(x.dtype))
    branch_act = None if work.proj_down is None else x @ work.proj_down.to(x.dtype)
    return finished(x @ weight.t(), replace(epilogue, branch_act=branch_act))


def w4a16(work: Work) -> torch.Tensor:
    layer, epilogue = work.layer, work.epilogue
    y = launch.multiply_gemv(work.x, layer["qweight"], layer["wscales"], layer["wzeros"], epilogue.bias)
    return finished(y, replace(epilogue, bias=None))


def finished(y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """epilogue(y), what the kernels do in registers, by torch in place of y"""
    if epilogue.branch_act is not None and epilogue.proj_up is not None:
        y.addmm_(epilogue.branch_act, epilogue.proj_up.to(y.dtype).t())
    lora_act = epilogue.weighted_lora()
    if lora_act is not None and epilogue.lora_up is not None:
        y.addmm_(lora_act, epilogue.lora_up.to(y.dtype).t())
    if epilogue.bias is not None:
        y += epilogue.bias.to(y.dtype)
    return activate(y, epilogue.activation)


MODES = {
    "w4a4": w4a4,
    "w4a8": w4a8,
    "w8a8": w8a8,
    "w4a8-jit": w4a8_jit,
    "fp8": fp8,
    "w16": w16,
    "w4a16": w4a16,
}


def work(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: Lora | None,
    activation: str = "",
) -> Work:
    """A call, with the product of x and lora_down, which is torch's"""
    down, up, strength = (None, None, None) if lora is None else Lora(*lora)
    epilogue = Epilogue(
        proj_up=layer["proj_up"] if layer.spec.rank else None,
        lora_act=None if down is None else x @ down.to(x.dtype),
        lora_up=up,
        lora_strength=None if strength is None else strength.float(),
        bias=bias,
        activation=activation,
    )
    return Work(x, layer, epilogue)


def linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: Lora | None,
    compute: str,
    activation: str = "",
) -> torch.Tensor:
    """One layer on x (M, K). Returns (M, N) in the dtype of x."""
    return MODES[compute](work(x, layer, bias, lora, activation))
