"""decode(quantize(x)) of an activation, without the codes in between: what a CPU spends its time on.

The numbers are those of the formats, bit for bit.
"""

import torch

from .layer import LayerSpec

BLOCK = 1 << 17  # values at a time: what a core's cache holds with the copies in between
GPU_BLOCK = 1 << 24  # a GPU would wait after each block


def rounded(act: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """decode_activation(quantize_activation(act)), float32. act is (M, K), smoothed"""
    rows = max(1, (BLOCK if act.device.type == "cpu" else GPU_BLOCK) // act.shape[1])
    if act.shape[0] <= rows:
        return spec.fmt.round_activation(act, spec.act_unsigned, spec.act_rule)
    out = torch.empty(act.shape, dtype=torch.float32, device=act.device)
    for start in range(0, act.shape[0], rows):
        part = slice(start, start + rows)
        out[part] = spec.fmt.round_activation(act[part], spec.act_unsigned, spec.act_rule)
    return out
