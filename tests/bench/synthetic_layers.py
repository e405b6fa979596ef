"""Linear layers with the traits that make diffusion transformers hard to round: (weight, tokens) pairs by kind.

    adaln     modulated norm before qkv and fc1: 1 % of the channels 10 to 100 times larger, gains that follow the step
    attention attention output: milder outliers, tokens of different size
    gelu      input of fc2: a real random first layer, GELU, a few channels that are always on
    massive   adaln with 1 % of the tokens 8 times larger and one channel at 40

Weights are Student-t with 5 degrees of freedom, scaled per row and column, plus a decaying low-rank part.
"""

from dataclasses import dataclass

import torch

KINDS = ("adaln", "attention", "gelu", "massive")
STEPS = 8


@dataclass(frozen=True)
class SyntheticLayer:
    """weight (N, K), calibration and test tokens (M, K) before any shift, and whether they come out of a GELU."""

    weight: torch.Tensor
    calibration: torch.Tensor
    test: torch.Tensor
    gelu: bool


def heavy_weight(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """t_5 entries with log-normal row and column sizes, plus 48 directions of power 5 i^-0.6 of the typical one."""
    normal = torch.randn(6, n, k, generator=generator)
    weight = normal[0] / (normal[1:].square().mean(0)).sqrt()
    weight *= torch.exp(0.25 * torch.randn(n, 1, generator=generator))
    weight *= torch.exp(0.25 * torch.randn(1, k, generator=generator))
    left = torch.linalg.qr(torch.randn(n, 48, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(k, 48, generator=generator))[0]
    power = 5 * weight.norm() / min(n, k) ** 0.5 * torch.arange(1, 49).pow(-0.6)
    return (weight + (left * power) @ right.T) * 0.5 / k**0.5


def make(kind: str, n: int, k: int, tokens: int, seed: int, test: int = 1536) -> SyntheticLayer:
    """One layer of this kind; the same seed gives the same layer."""
    generator = torch.Generator().manual_seed(1000 * seed + KINDS.index(kind))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, count = heavy_weight(n, k, generator), tokens + test
    mixing = torch.linalg.qr(normal(k, k))[0] * torch.arange(1, k + 1).pow(-0.25)
    hidden = normal(count, k) @ mixing.T + 0.15 * normal(count, k)
    hidden = (hidden - hidden.mean(1, keepdim=True)) / hidden.std(1, keepdim=True)
    step = torch.randint(STEPS, (count, 1), generator=generator) / (STEPS - 1)
    large = torch.randperm(k, generator=generator)[: max(1, k // 100)]
    gain = torch.exp(0.4 * normal(k))
    gain[large] *= 10 ** (1 + torch.rand(len(large), generator=generator))
    modulated = hidden * gain * torch.exp(0.8 * normal(k) * (step - 0.5))
    if kind == "gelu":
        first = heavy_weight(k, k, generator)
        before = (hidden * torch.exp(0.3 * normal(k))) @ first.T * 2.2 * torch.exp(0.5 * (step - 0.5))
        before += 0.5 * normal(k) - 0.6
        always_on = torch.randperm(k, generator=generator)[: k // 80]
        before[:, always_on] = 6 * before[:, always_on] + 3
        x = torch.nn.functional.gelu(before)
    elif kind == "attention":
        mild = torch.exp(0.5 * normal(k))
        mild[large[: len(large) // 2 + 1]] *= 10
        x = hidden * mild * torch.exp(0.3 * normal(count, 1)) * (1 + step)
    elif kind == "massive":
        x = modulated + 0.3 * gain * normal(k)
        chosen = torch.rand(count, generator=generator) < 0.01
        x[chosen] *= 8
        x[chosen, large[0]] += 40
    else:
        x = modulated + 0.3 * gain * normal(k) * (1 - step)
    return SyntheticLayer(weight, x[:tokens].contiguous(), x[tokens:].contiguous(), kind == "gelu")
