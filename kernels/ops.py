"""The public operations as torch.library operators of flat tensors: torch.compile sees one node each, never inside.

Two copies of the pack may be loaded. The second finds the names taken: it uses them if their schemas are its own, else
it registers beside them under a numbered name.
"""

from collections.abc import Callable
from typing import Any

import torch

from . import dispatch
from .formats import FORMATS
from .layer import Layer, LayerSpec

NAMESPACE = "svdquant"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # the operators live as long as it does
TENSORS = ("qweight", "wscales", "wtscale", "wcscales", "wzeros", "smooth_factor", "proj_down", "proj_up", "act_mean",
           "out_mean")  # fmt: skip
GROUP = {"int4": ("int4", "w4a4"), "nvfp4": ("nvfp4", "w4a4"), "int8_group": ("int4", "w4a8")}
GROUP |= {"int8_row": ("int4", "w4a8-jit"), "fp8_row": ("int4", "fp8")}  # codes -> (format, mode) that makes them


def register(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """torch.ops.svdquant.<name> with this schema, registered unless a copy of the pack has done so already."""
    wanted, space = f"{NAMESPACE}::{name}{schema}", getattr(torch.ops, NAMESPACE)
    number, free = 1, name
    while hasattr(space, free):
        if str(getattr(space, free).default._schema) == wanted.replace(f"::{name}(", f"::{free}("):
            return getattr(space, free)
        number += 1
        free = f"{name}_{number}"
    LIBRARY.define(free + schema)
    # not torch.library.custom_op: its first call imports the compiler, seconds that only torch.compile needs
    LIBRARY.impl(free, _of_dense_tensors(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{free}", fake, lib=LIBRARY)
    return getattr(space, free)


def _of_dense_tensors(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels find an element by the shape alone; of an activation that comes first they know the stride."""

    def run(first: torch.Tensor, *rest: Any) -> Any:
        first = first if first.is_floating_point() else first.contiguous()
        return implementation(first, *[each.contiguous() if isinstance(each, torch.Tensor) else each for each in rest])

    return run


def _weights(*tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in zip(TENSORS, tensors, strict=False) if tensor is not None}


def _linear(x, qweight, wscales, wtscale, wcscales, wzeros, smooth_factor, proj_down, proj_up, act_mean, out_mean, bias,
            lora_down, lora_up, lora_strength, format, act_unsigned, act_rule, act_bits, compute,
            activation):  # fmt: skip
    tensors = _weights(
        qweight, wscales, wtscale, wcscales, wzeros, smooth_factor, proj_down, proj_up, act_mean, out_mean
    )
    rank = 0 if proj_down is None else proj_down.shape[1]
    n, k = qweight.shape[0], 2 * qweight.shape[1]
    layer = Layer(LayerSpec(format, n, k, rank, tuple(act_unsigned), act_rule, act_bits), tensors)
    lora = None if lora_down is None else (lora_down, lora_up)
    return dispatch.run(x, layer, bias, lora, compute, lora_strength, activation)


def _linear_fake(x, qweight, *rest):
    return x.new_empty(x.shape[0], qweight.shape[0])


def _quantize_activation(x, smooth_factor, proj_down, act_mean, codes, act_unsigned, act_rule):
    format, compute = GROUP[codes]
    step = dispatch.stage("quantize_activation", format, x.device, x.dtype, compute)
    qact, ascales, branch_act = step(x, smooth_factor, proj_down, codes, tuple(act_unsigned), act_rule, act_mean)
    return qact, ascales, x.new_empty(x.shape[0], 0) if branch_act is None else branch_act


def _quantize_activation_fake(x, smooth_factor, proj_down, act_mean, codes, act_unsigned, act_rule):
    m, k = x.shape
    branch_act = x.new_empty(m, 0 if proj_down is None else proj_down.shape[1])
    if codes in ("int8_row", "fp8_row"):
        kind = torch.int8 if codes == "int8_row" else torch.float8_e4m3fn
        return x.new_empty(m, k, dtype=kind), x.new_empty(m, dtype=torch.float32), branch_act
    if codes == "int8_group":
        return x.new_empty(m, k, dtype=torch.int8), x.new_empty(k // 64, m, dtype=torch.float32), branch_act
    kind = torch.float8_e4m3fn if codes == "nvfp4" else x.dtype
    ascales = x.new_empty(k // FORMATS[codes].group_size, m, dtype=kind)
    return x.new_empty(m, k // 2, dtype=torch.int8), ascales, branch_act


def _linear_w4(qact, ascales, qweight, wscales, wtscale, wcscales, branch_act, proj_up, bias, format, act_unsigned,
               activation, dtype):  # fmt: skip
    compute = "w4a8" if qact.shape[1] == 2 * qweight.shape[1] else "w4a4"
    step = dispatch.stage("linear_w4", format, qact.device, dtype, compute)
    weights = _weights(qweight, wscales, wtscale, wcscales)
    return step(qact, ascales, weights, branch_act, proj_up, bias, format, tuple(act_unsigned), activation, dtype)


def _linear_w4_fake(qact, ascales, qweight, *rest):
    return qact.new_empty(qact.shape[0], qweight.shape[0], dtype=rest[-1])


def _linear_w4_requantize(qact, ascales, qweight, wscales, branch_act, proj_up, bias, next_smooth, act_unsigned, dtype):
    compute = "w4a8" if qact.shape[1] == 2 * qweight.shape[1] else "w4a4"
    step = dispatch.stage("linear_w4_requantize", "int4", qact.device, dtype, compute)
    weights = _weights(qweight, wscales)
    return step(qact, ascales, weights, branch_act, proj_up, bias, next_smooth, tuple(act_unsigned), dtype)


def _linear_w4_requantize_fake(qact, ascales, qweight, *rest):
    m, n, dtype = qact.shape[0], qweight.shape[0], rest[-1]
    codes = qact.new_empty(m, n // 2, dtype=torch.int8)
    return qact.new_empty(m, n, dtype=dtype), codes, qact.new_empty(n // 64, m, dtype=dtype)


def _expand_weight(qweight, wscales, wtscale, wcscales, format, dtype):
    mode = "w4a8-jit" if dtype == torch.int8 else "fp8"
    step = dispatch.stage("expand_weight", format, qweight.device, torch.bfloat16, mode)
    return step(_weights(qweight, wscales, wtscale, wcscales), format, dtype)


def _expand_weight_fake(qweight, wscales, wtscale, wcscales, format, dtype):
    n, half = qweight.shape
    return qweight.new_empty(n, 2 * half, dtype=dtype), qweight.new_empty(n, dtype=torch.float32)


def _linear_w8a8(qact, ascales, weight, row_scales, branch_act, proj_up, bias, activation, dtype):
    step = dispatch.stage("linear_w8a8", "int4", qact.device, dtype, "w4a8-jit")
    return step(qact, ascales, weight, row_scales, branch_act, proj_up, bias, activation, dtype)


def _linear_w8a8_fake(qact, ascales, weight, *rest):
    return qact.new_empty(qact.shape[0], weight.shape[0], dtype=rest[-1])


def _gemv_w4a16(x, qweight, wscales, wzeros, bias):
    step = dispatch.stage("gemv_w4a16", "awq_w4a16", x.device, x.dtype, "w4a16")
    return step(x, {"qweight": qweight, "wscales": wscales, "wzeros": wzeros}, bias)


WEIGHT = "Tensor qweight, Tensor wscales, Tensor? wtscale, Tensor? wcscales"
BRANCH = "Tensor? branch_act, Tensor? proj_up, Tensor? bias"
linear = register(
    "linear",
    f"(Tensor x, {WEIGHT}, Tensor? wzeros, Tensor? smooth_factor, Tensor? proj_down, Tensor? proj_up, "
    "Tensor? act_mean, Tensor? out_mean, Tensor? bias, Tensor? lora_down, Tensor? lora_up, Tensor? lora_strength, "
    "str format, SymInt[] act_unsigned, str act_rule, int act_bits, str compute, str activation) -> Tensor",
    _linear,
    _linear_fake,
)
quantize_activation = register(
    "quantize_activation",
    "(Tensor x, Tensor? smooth_factor, Tensor? proj_down, Tensor? act_mean, str codes, SymInt[] act_unsigned, "
    "str act_rule) -> (Tensor, Tensor, Tensor)",
    _quantize_activation,
    _quantize_activation_fake,
)
linear_w4 = register(
    "linear_w4",
    f"(Tensor qact, Tensor ascales, {WEIGHT}, {BRANCH}, str format, SymInt[] act_unsigned, str activation, "
    "ScalarType dtype) -> Tensor",
    _linear_w4,
    _linear_w4_fake,
)
linear_w4_requantize = register(
    "linear_w4_requantize",
    f"(Tensor qact, Tensor ascales, Tensor qweight, Tensor wscales, {BRANCH}, Tensor next_smooth, "
    "SymInt[] act_unsigned, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _linear_w4_requantize,
    _linear_w4_requantize_fake,
)
expand_weight = register(
    "expand_weight",
    f"({WEIGHT}, str format, ScalarType dtype) -> (Tensor, Tensor)",
    _expand_weight,
    _expand_weight_fake,
)
linear_w8a8 = register(
    "linear_w8a8",
    f"(Tensor qact, Tensor ascales, Tensor weight, Tensor row_scales, {BRANCH}, str activation, ScalarType dtype) "
    "-> Tensor",
    _linear_w8a8,
    _linear_w8a8_fake,
)
gemv_w4a16 = register(
    "gemv_w4a16",
    "(Tensor x, Tensor qweight, Tensor wscales, Tensor wzeros, Tensor? bias) -> Tensor",
    _gemv_w4a16,
    _linear_fake,
)
