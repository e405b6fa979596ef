"""smooth_factor: how much of each input channel's range moves between activation and weight."""

import torch

LIMITS = (1e-2, 1e2)  # beyond these, activations under- or overflow the 16-bit and E4M3 ranges


def from_weight_spans(weight: torch.Tensor, power: float) -> torch.Tensor:
    """smooth[k] = (absmax_n |weight[n, k]|) ** -power, scaled to geometric mean 1

    The data-free rule: it levels the spans of the weight's input channels, so that one large channel does not set the
    scale of its whole group. weight (N, K); returns (K,) float32. Dead channels (all zero) get 1.
    """
    span = weight.abs().amax(0)
    alive = span > 0
    log = torch.where(alive, span, 1).log()
    if alive.any():
        log = torch.where(alive, log - log[alive].mean(), 0)
    return (-power * log).exp().clamp(*LIMITS)
