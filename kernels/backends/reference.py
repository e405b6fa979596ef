"""Plain torch on any device: the definition of right.

Two ways to compute, both with every sum in float32 (float64 for a float64 activation) and one rounding at the end:

    w4a4   y = Q((x + shift) / smooth) @ decode(qweight).T + (x @ proj_down) @ proj_up.T + bias
    w16    the same without Q: what a dense layer holding the decoded weight would give
"""

import torch

from ..formats.int4 import GELU_SHIFT
from ..layer import Layer
from . import Backend, Call

COMPUTES = ("w4a4", "w16")


def refuses(call: Call) -> str | None:
    if call.compute not in COMPUTES:
        return f"computes {' or '.join(COMPUTES)}, not {call.compute}"
    return None


def smooth_activation(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """(x + shift) / smooth_factor, computed in fp32 and rounded once to the dtype of x. x is (M, K)."""
    wide = x if x.dtype == torch.float64 else x.float()
    start, stop = layer.spec.act_unsigned
    if start != stop:
        shift = torch.zeros(x.shape[-1], dtype=wide.dtype, device=x.device)
        shift[start:stop] = GELU_SHIFT
        wide = wide + shift
    return (wide / layer["smooth_factor"].to(wide.dtype)).to(x.dtype)


def low_rank(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """(x @ down) @ up.T in the dtype of x. down (K, R), up (N, R)."""
    return (x @ down.to(x.dtype)) @ up.to(x.dtype).T


def linear(
    x: torch.Tensor,
    layer: Layer,
    bias: torch.Tensor | None,
    lora: tuple[torch.Tensor, torch.Tensor] | None,
    compute: str,
) -> torch.Tensor:
    """One layer on x (M, K); see the module docstring. Returns (M, N) in the dtype of x."""
    spec, fmt = layer.spec, layer.spec.fmt
    act = smooth_activation(x, layer) if fmt.low_rank else x
    wide_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if compute == "w4a4" and fmt.quantize_activation is not None:
        codes, ascales = fmt.quantize_activation(act, spec.act_unsigned)
        act = fmt.decode_activation(codes, ascales, spec.act_unsigned)
    y = act.to(wide_dtype) @ layer.decode_weight().to(wide_dtype).T
    wide = x.to(wide_dtype)
    if spec.rank:
        y += low_rank(wide, layer["proj_down"], layer["proj_up"])
    if lora is not None:
        y += low_rank(wide, *lora)
    if bias is not None:
        y += bias.to(wide_dtype)
    return y.to(x.dtype)


BACKEND = Backend("reference", 0, refuses, linear)
