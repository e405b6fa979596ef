"""comfy-kitchen's CUDA operations, where that package is installed: INT4 tensor cores of sm_80 to sm_89.

It keeps weights in the pack's own order. From sm_90 on its INT4 instruction is a subroutine, and other backends are
faster. Its operation has one sign for all channels of a layer, so it refuses the partly unsigned ones (38 of FLUX.1),
and takes x shifted already, which is one pass more over the activation.
"""

import importlib.util
from functools import cache

import torch

from ..formats import GELU_SHIFT, GROUP_SIZE, TWOS_COMPLEMENT
from ..layer import RANK_TILE, Layer, Lora
from . import Backend, KernelCall, each_call

FIRST, LAST = (8, 0), (8, 9)
DTYPES = (torch.bfloat16, torch.float16)
CLAIM = 40  # above the pack's own INT4 kernels


def claims(call: KernelCall) -> int | str:
    fmt = call.fmt
    if call.compute != "w4a4" or (fmt.code, fmt.group_size) != (TWOS_COMPLEMENT, GROUP_SIZE):
        return f"computes w4a4 of int4, not {call.compute} of {call.format}"
    if call.device.type != "cuda" or call.capability is None:
        return f"needs an NVIDIA GPU, this is {call.arch or call.device.type}"
    if not FIRST <= call.capability <= LAST:
        has = ".".join(map(str, call.capability))
        return f"INT4 tensor cores exist up to compute capability 8.9 and it needs 8.0, this GPU has {has}"
    if call.dtype not in DTYPES:
        return f"computes in bf16 or fp16, not {call.dtype}"
    if call.partly_unsigned:
        return "cannot mix signed and unsigned channels in one layer"
    return missing() or CLAIM


@cache
def missing() -> str | None:
    """Why its CUDA kernels are not there, or None."""
    if importlib.util.find_spec("comfy_kitchen") is None:
        return "the package comfy-kitchen is not installed"
    import comfy_kitchen

    for name in ("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4", "list_backends"):
        if not hasattr(comfy_kitchen, name):
            return f"this comfy-kitchen has no {name}, it is too old"
    cuda = comfy_kitchen.list_backends().get("cuda", {})
    if not cuda.get("available") or cuda.get("disabled"):
        return f"its CUDA kernels are off: {cuda.get('unavailable_reason') or 'disabled by the host'}"
    return None


def _columns(layer: Layer, lora: Lora | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(down (K, R), up (N, R)) of branch and LoRA side by side; zeros fill up R to a multiple of RANK_TILE, not 0"""
    downs = [layer["proj_down"]] if layer.spec.rank else []
    ups = [layer["proj_up"]] if layer.spec.rank else []
    if lora is not None:
        downs.append(lora[0])
        ups.append(lora[1])
    width = sum(down.shape[1] for down in downs)
    missing_columns = -width % RANK_TILE if width else RANK_TILE
    if missing_columns:
        like = layer["smooth_factor"]
        downs.append(like.new_zeros(layer.spec.k, missing_columns))
        ups.append(like.new_zeros(layer.spec.n, missing_columns))
    if len(downs) == 1:
        return downs[0].to(dtype), ups[0].to(dtype)
    return torch.cat([down.to(dtype) for down in downs], 1), torch.cat([up.to(dtype) for up in ups], 1)


def linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: Lora | None,
    compute: str,
) -> torch.Tensor:
    """One layer on x (M, K). Returns (M, N) in the dtype of x."""
    import comfy_kitchen

    if not x.shape[0]:
        return x.new_empty(0, layer.spec.n)
    x, dtype = x.contiguous(), x.dtype
    unsigned = layer.spec.act_unsigned[0] != layer.spec.act_unsigned[1]
    down, up = _columns(layer, lora, dtype)
    shifted = x + GELU_SHIFT if unsigned else x
    if "act_mean" in layer.tensors:
        shifted = shifted - layer["act_mean"].to(dtype)
        bias = layer.centred_bias(bias)
    with torch.cuda.device_of(x):  # a kernel is launched on the current device, whatever its tensors are on
        qact, ascales, branch_act = comfy_kitchen.quantize_svdquant_w4a4(
            shifted, layer["smooth_factor"].to(dtype), down, act_unsigned=unsigned, lora_x=x
        )
        y = comfy_kitchen.scaled_mm_svdquant_w4a4(
            qact,
            layer["qweight"],
            ascales,
            layer["wscales"].to(dtype),
            branch_act.to(dtype),
            up,
            None if bias is None else bias.to(dtype),
            act_unsigned=unsigned,
        )
    return y[: x.shape[0]]  # it pads the rows


BACKEND = Backend("kitchen", claims, each_call(linear))
