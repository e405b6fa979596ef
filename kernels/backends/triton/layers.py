"""A whole layer in each compute mode: the launches, in order.

A mode is a function of a `Kind` of call. It looks up what all calls of that kind share, and returns what runs one.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch

from ...formats import E2M1_CODE, Tensors
from ...layer import Layer, Lora
from ...stages import CodedActivation, Coding, activate, channel_scales_of
from ...weight_cache import WeightCache
from .. import Run
from . import launch, launch_expand
from .launch import Epilogue

KEPT = 0.5  # of a GPU's free memory, for weights that w8a8 keeps expanded


class Kind(NamedTuple):
    """One call, which stands for all with tensors of the same shapes and types; of x, with about as many rows."""

    x: torch.Tensor
    layer: Layer
    bias: torch.Tensor | None
    lora: Lora | None
    activation: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.spec.n, self.layer.spec.k

    @property
    def end(self) -> Epilogue:
        """An epilogue like those of such calls"""
        return Epilogue(bias=self.bias, activation=self.activation)


Quantize = Callable[[torch.Tensor, Layer, Lora | None], tuple[CodedActivation, torch.Tensor | None]]
Expand = Callable[[Layer], tuple[torch.Tensor, torch.Tensor | None]]


def quantizer(x: torch.Tensor, layer: Layer, codes: str, lora: Lora | None = None) -> Quantize:
    """(x, layer, lora) -> (x in codes, act), for calls like this one; codes as in stages.quantize_activation

    act  x @ [proj_down | lora.down * strength], see launch.Quantizer
    """
    spec, tensors = layer.spec, layer.tensors
    coding = Coding(codes, spec.act_unsigned, spec.act_rule)
    downs = tensors.get("proj_down"), None if lora is None else lora.down
    quantize = launch.Quantizer(x, downs, coding, means="act_mean" in tensors)

    def run(x: torch.Tensor, layer: Layer, lora: Lora | None) -> tuple[CodedActivation, torch.Tensor | None]:
        tensors = layer.tensors
        proj_down, act_mean = tensors.get("proj_down"), tensors.get("act_mean")
        qact, ascales, act = quantize(x, tensors["smooth_factor"], proj_down, act_mean, lora)
        return CodedActivation(qact, ascales), act

    return run


def expander(layer: Layer, dtype: torch.dtype) -> Expand:
    """layer -> (its weight, what lies beside it) for layers like this one, see launch_expand.Expander

    torch's allocator hands out the same scratch memory for each call.
    """
    spec, tensors = layer.spec, layer.tensors
    smooth = dtype not in spec.fmt.units and "smooth_factor" in tensors
    channel = "wtscale" in tensors or "wcscales" in tensors
    unsigned = spec.act_unsigned if smooth else (0, 0)
    expand = launch_expand.expander(spec.fmt, tensors, dtype, channel, smooth, unsigned)

    def run(layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
        scales = _once(layer, channel_scales_of) if channel else None
        return expand(layer.tensors, scales, layer["smooth_factor"] if smooth else None)

    return run


def _once(layer: Layer, compute: Callable[[Tensors], torch.Tensor]) -> torch.Tensor:
    sources = [layer[name] for name in ("qweight", "wtscale", "wcscales") if name in layer.tensors]
    return layer.once(compute.__name__, sources, lambda: compute(layer.tensors))


def end_of(
    layer: Layer, act: torch.Tensor | None, bias: torch.Tensor | None, lora: Lora | None, activation: str
) -> Epilogue:
    """What follows the product of a call"""
    return Epilogue(act, layer.tensors.get("proj_up"), None if lora is None else lora.up, bias, activation)


def w4a4(kind: Kind) -> Run:
    spec, nvfp4 = kind.layer.spec, kind.layer.spec.fmt.code == E2M1_CODE
    quantize, activation = quantizer(kind.x, kind.layer, spec.format, kind.lora), kind.activation
    end = kind.end._replace(bias=kind.layer.centred_bias(kind.bias))
    if nvfp4:
        product = launch.Product("gemm_nvfp4", kind.x, kind.shape, end, {})
    else:
        product = launch.product_w4(kind.x, kind.shape, False, end)

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        coded, act = quantize(x, layer, lora)
        end = end_of(layer, act, layer.centred_bias(bias), lora, activation)
        if nvfp4:
            scales = _once(layer, channel_scales_of)
            return product(coded, launch.nvfp4_weight(layer.tensors, scales), end)
        return product(coded, (layer["qweight"], layer["wscales"]), end, spec.act_unsigned, None)

    return run


def w4a8(kind: Kind) -> Run:
    quantize, activation = quantizer(kind.x, kind.layer, "int8_group", kind.lora), kind.activation
    product = launch.product_w4(kind.x, kind.shape, True, kind.end)

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        coded, act = quantize(x, layer, lora)
        end = end_of(layer, act, bias, lora, activation)
        # 8-bit codes have a sign bit to spare: the shift is in them, unsigned codes are not needed
        return product(coded, (layer["qweight"], layer["wscales"]), end, (0, 0), None)

    return run


def _by_rows(kind: Kind, weight_of: Callable[[Layer], tuple[torch.Tensor, torch.Tensor]]) -> Run:
    quantize, activation = quantizer(kind.x, kind.layer, "int8_row", kind.lora), kind.activation
    product = launch.Product("gemm_w8", kind.x, kind.shape, kind.end, {})

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        weight = weight_of(layer)
        coded, act = quantize(x, layer, lora)
        return product(coded, weight, end_of(layer, act, bias, lora, activation))

    return run


def _rows(layer: Layer) -> Callable[[Layer], tuple[torch.Tensor, torch.Tensor]]:
    """layer -> (weight (N, K) int8, row_scales (N,))"""
    return cast(Callable[[Layer], tuple[torch.Tensor, torch.Tensor]], expander(layer, torch.int8))


def w4a8_jit(kind: Kind) -> Run:
    return _by_rows(kind, _rows(kind.layer))


_kept: dict[torch.device, WeightCache[tuple[torch.Tensor, torch.Tensor]]] = {}


def w8a8(kind: Kind) -> Run:
    """The same bytes as w4a8_jit, kept while the layer's own bytes are where they are, as far as there is room"""
    spec, device, expand = kind.layer.spec, kind.x.device, _rows(kind.layer)
    cache = _kept.setdefault(device, WeightCache(lambda: _may_keep(device)))
    variant = (spec.format, "int8")
    return _by_rows(kind, lambda layer: cache.get(layer["qweight"], variant, lambda: expand(layer), spec.n * spec.k))


def _may_keep(device: torch.device) -> int:
    """Bytes of expanded weights in all that this device has room for now"""
    if device.type != "cuda":
        return 1 << 30
    free, _ = torch.cuda.mem_get_info(device)
    return int(KEPT * (free + _kept[device].nbytes))


def fp8(kind: Kind) -> Run:
    """The product by torch, which has its own row scales; the epilogue follows it"""
    quantize, expand = quantizer(kind.x, kind.layer, "fp8_row", kind.lora), expander(kind.layer, torch.float8_e4m3fn)
    activation = kind.activation

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        (qact, ascales), act = quantize(x, layer, lora)
        if not x.shape[0]:
            return x.new_empty(0, layer.spec.n)
        weight, row_scales = expand(layer)
        assert row_scales is not None  # every 8-bit dtype of a format has them
        y = torch._scaled_mm(
            qact, weight.t(), scale_a=ascales[:, None], scale_b=row_scales[None], out_dtype=torch.bfloat16
        )
        return finished(y.to(x.dtype), end_of(layer, act, bias, lora, activation))

    return run


def w16(kind: Kind) -> Run:
    """x @ (decode(qweight) / smooth_factor).T: smoothing goes into the expanded weight, the shift into the bias"""
    expand, activation = expander(kind.layer, kind.x.dtype), kind.activation

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        weight, shift = expand(layer)
        if shift is not None:
            bias = (shift if bias is None else bias.float() + shift).to(x.dtype)
        return finished(x @ weight.t(), end_of(layer, columns(x, layer, lora), bias, lora, activation))

    return run


def w4a16(kind: Kind) -> Run:
    gemv, activation = launch.Gemv(kind.x, kind.layer.spec.n, kind.bias is not None), kind.activation

    def run(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        return finished(gemv(x, layer.tensors, bias), end_of(layer, columns(x, layer, lora), None, lora, activation))

    return run


def columns(x: torch.Tensor, layer: Layer, lora: Lora | None) -> torch.Tensor | None:
    """x @ [proj_down | lora.down * strength] where nothing is quantized, by torch"""
    width = layer.spec.rank + (0 if lora is None else lora.down.shape[1])
    if not width:
        return None
    act = x.new_empty(x.shape[0], width)
    launch.columns_by_torch(x, act, layer.tensors.get("proj_down"), lora)
    return act


def finished(y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """epilogue(y), what the kernels do in registers, by torch in place of y"""
    act, first = epilogue.act, 0
    for up in (epilogue.proj_up, epilogue.lora_up):
        if act is not None and up is not None:
            y.addmm_(act[:, first : first + up.shape[1]], up.to(y.dtype).t())
            first += up.shape[1]
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


def prepare(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: Lora | None,
    compute: str,
    activation: str,
) -> Run:
    """What runs this call and all like it, see Backend. It keeps no tensor of the layer or the call."""
    return MODES[compute](Kind(x, layer, bias, lora, activation))
