"""GPTQ: round a weight column by column and let the columns that follow make up for the error.

Source: GPTQ, arXiv 2210.17323, with static group scales and activation order.
"""

from dataclasses import dataclass

import torch

from .moments import Gram
from .rounding import WeightScales

DAMPING = 0.01  # of the mean diagonal, added to it
BLOCK = 128  # columns between two updates of everything that follows


@dataclass(frozen=True)
class GptqFactor:
    """inverse(H[order][:, order] + damping) = upper.T @ upper, for one diagonal block of H that starts at `start`"""

    start: int
    order: torch.Tensor
    upper: torch.Tensor


def factorize(hessian: Gram, damping: float = DAMPING) -> list[GptqFactor]:
    """One factor per diagonal block; columns by falling diagonal, dead ones (diagonal zero) are left as they are."""
    return [
        GptqFactor(start, *_factorize_block(block, damping))
        for start, block in zip(hessian.starts, hessian.blocks, strict=True)
    ]


def _factorize_block(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    diagonal = hessian.diagonal()
    level = diagonal.mean().clamp_min(1e-30)
    order = torch.argsort(diagonal, descending=True, stable=True)
    # flipped: with F = reversed H = M M.T, the reversed M is upper, and its inverse is the factor that GPTQ needs
    flipped = order.flip(0)
    damped = hessian[flipped][:, flipped]
    damped.diagonal().add_(damping * level)
    damped.diagonal()[(diagonal <= 0)[flipped]] = 1
    wide = damped if len(damped) > Gram.WIDE else damped.double()
    lower, failed = torch.linalg.cholesky_ex(wide)
    while failed:  # round-off of a nearly singular float32 matrix
        wide.diagonal().add_(damping * level)
        lower, failed = torch.linalg.cholesky_ex(wide)
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return order, upper.float().contiguous()


def gptq(target: torch.Tensor, factors: list[GptqFactor], scales: WeightScales) -> torch.Tensor:
    """Q on the grid of `scales` with a small sum over rows of (target - Q) H (target - Q).T

    target (N, K) float32; returns (N, K). The scales stay what they are.
    """
    rounded = torch.empty_like(target)
    group = target.shape[1] // scales.step.shape[1]
    steps = scales.step.T.contiguous()  # (K/group, N): one column of the weight is one row here
    for factor in factors:
        columns = factor.start + factor.order
        done = _gptq_block(target[:, columns].T.contiguous(), factor.upper, steps, columns // group, scales)
        rounded[:, columns] = done.T
    return rounded


def _gptq_block(
    rest: torch.Tensor, upper: torch.Tensor, steps: torch.Tensor, groups: torch.Tensor, scales: WeightScales
) -> torch.Tensor:
    """rest (K, N) is overwritten: what is left of the target after the errors so far are made up for."""
    rounded = torch.empty_like(rest)
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        triangle = upper[start:stop, start:stop]
        pivots = triangle.diagonal().tolist()
        errors = torch.empty_like(rest[start:stop])
        for i, group in enumerate(groups[start:stop].tolist()):
            column = rest[start + i]
            if i:
                column = torch.addmv(column, errors[:i].T, triangle[:i, i], alpha=-1)
            near = scales.nearest(column, steps[group])
            rounded[start + i] = near
            errors[i] = (column - near) / pivots[i]
        if stop < len(rest):
            rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return rounded
