"""decode(quantize(x)) of an activation, without the codes in between: what a CPU spends its time on.

The numbers are those of kernels/formats, bit for bit. Where the short way could differ (NaN, Inf, scales so small that
their reciprocal overflows) the formats themselves are used.
"""

import torch

from .formats.nvfp4 import E2M1_MAX, E4M3_MAX
from .layer import LayerSpec

BLOCK = 1 << 17  # values at a time: what a core's cache holds with the copies in between
GPU_BLOCK = 1 << 24  # a GPU would wait after each block


def rounded(act: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """decode_activation(quantize_activation(act)), float32. act is (M, K), smoothed"""
    rows = max(1, (BLOCK if act.device.type == "cpu" else GPU_BLOCK) // act.shape[1])
    if act.shape[0] <= rows:
        return _block(act, spec)
    out = torch.empty(act.shape, dtype=torch.float32, device=act.device)
    for start in range(0, act.shape[0], rows):
        out[start : start + rows] = _block(act[start : start + rows], spec)
    return out


def _block(act: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    short = {"int4": _int4, "nvfp4": _nvfp4}.get(spec.format)
    found = None if short is None else short(act, spec)
    if found is None:
        fmt = spec.fmt
        codes, ascales = fmt.quantize_activation(act, spec.act_unsigned, spec.act_rule)
        found = fmt.decode_activation(codes, ascales, spec.act_unsigned)
    return found


def _int4(act: torch.Tensor, spec: LayerSpec) -> torch.Tensor | None:
    """Signed and unsigned channels, each in one stretch"""
    start, stop = spec.act_unsigned
    if start == stop:
        return _int4_stretch(act, False, spec.act_rule)
    ends = (0, start, stop, spec.k)
    parts = []
    for first, last, unsigned in zip(ends, ends[1:], (False, True, False), strict=False):
        if first != last:
            part = _int4_stretch(act[:, first:last], unsigned, spec.act_rule)
            if part is None:
                return None
            parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _int4_stretch(act: torch.Tensor, unsigned: bool, rule: str) -> torch.Tensor | None:
    groups = act.float().unflatten(-1, (-1, 64))
    extreme = (groups if unsigned else groups.abs()).amax(-1, keepdim=True)
    if unsigned:
        extreme = extreme.clamp_min_(0)
    top = torch.full_like(extreme, 15.0 if unsigned else 7.0)  # a tensor: torch divides by a number in another way
    scales = extreme / top
    if not unsigned and rule == "signed_extreme":
        scales = torch.where(groups.amax(-1, keepdim=True) >= extreme, -extreme, extreme) / 8
    reciprocal = torch.where(scales == 0, 0.0, 1 / scales)
    if not _finite(reciprocal, extreme):
        return None
    codes = (groups * reciprocal).round_()
    if unsigned:
        codes.clamp_(0, 15)
    elif rule == "signed_extreme":
        codes.clamp_(max=7)
    return codes.mul_(scales.to(act.dtype).float()).flatten(-2)


def _nvfp4(act: torch.Tensor, spec: LayerSpec) -> torch.Tensor | None:
    """Nearest E2M1 value: the step between values is half of the power of two below |v|, at least 1/2"""
    if spec.act_rule != "absmax":
        return None
    groups = act.float().unflatten(-1, (-1, 16))
    extreme = groups.abs().amax(-1, keepdim=True)
    scales = (extreme / E2M1_MAX).clamp_max(E4M3_MAX)
    reciprocal = torch.where(scales == 0, 0.0, 1 / scales)
    if not _finite(reciprocal, extreme):
        return None
    values = (groups * reciprocal).clamp_(-E2M1_MAX, E2M1_MAX)
    power = values.abs().clamp_(min=1).view(torch.int32).bitwise_and_(0x7F800000)
    step = power.sub_(1 << 23).view(torch.float32)  # one less in the exponent: half
    codes = values.div_(step).round_().mul_(step)
    return codes.mul_(scales.to(torch.float8_e4m3fn).float()).flatten(-2)


def _finite(*parts: torch.Tensor) -> bool:
    """Whether the sum over all parts is finite: then every element is (else they may be, and the long way is taken)"""
    return all(part.sum().isfinite() for part in parts)
