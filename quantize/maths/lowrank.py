"""The low-rank branch: split a matrix into a thin product and a rest."""

from collections.abc import Sequence

import torch

from .inputs import Gram

OVERSAMPLING = 16
POWER_STEPS = 4


def split(
    matrix: torch.Tensor, rank: int, seed: int, power_steps: int = POWER_STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) with up @ down.T the best approximation of `matrix` (N, K) of this rank, by randomized SVD

    power_steps  0.2 to 0.5 % more error than the exact SVD with 3, 1.5 to 4.5 % with 1
    returns      down (K, R), up (N, R), float32; the singular values are shared evenly. The same seed gives the same
                 bytes.
    """
    found = min(rank, *matrix.shape)
    u, s, v = leading(matrix, found, power_steps, seed)
    root = s[:found].sqrt()
    return pad(v[:, :found] * root, rank), pad(u[:, :found] * root, rank)


def leading(
    matrix: torch.Tensor, count: int, power_steps: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`randomized_svd` of at least so many singular values, or where a full SVD is as cheap that one"""
    width = count + OVERSAMPLING
    if width < min(matrix.shape) // 2:
        return randomized_svd(matrix, width, power_steps, seed)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.T


def randomized_svd(
    matrix: torch.Tensor, width: int, power_steps: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(u (N, width), s (width,), v (K, width)) with u diag(s) v.T the part of `matrix` that random probes find

    Own random numbers, drawn on the CPU: the host's generators are left alone, and every device sees the same probes.
    Source: Halko, Martinsson, Tropp, SIAM Review 53(2), 2011, algorithms 4.4 and 5.1.
    """
    probes = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(seed)).to(matrix)
    basis = torch.linalg.qr(matrix @ probes)[0]
    for _ in range(power_steps):
        basis = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    inner, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ inner, s, vh.T


def split_exactly(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`split` by a full float64 SVD: what the reference quantizer does, and what randomizing is measured against."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return pad((vh[:rank].T * root).float(), rank), pad((u[:, :rank] * root).float(), rank)


def refit(residual: torch.Tensor, root: Gram, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L = SVD_r(residual @ C) @ inverse(C), the least-squares fit of rank r in the metric C C.T of the activations

    residual  (N, K) what the branch has to add to the rounded weight
    root      Gram.root of the smoothed input
    returns   (down (K, R), up (N, R)) with L = up @ down.T
    """
    down, up = split(root.times(residual), rank, seed, power_steps=2)
    return balance(root.solve_transposed(down), up)


def tails(matrix: torch.Tensor, ranks: Sequence[int], seed: int) -> tuple[float, ...]:
    """||M - SVD_r(M)||^2 / ||M||^2 for every r of `ranks`, which rise, from one SVD"""
    values = leading(matrix, min(ranks[-1], *matrix.shape), 2, seed)[1]
    total = matrix.double().square().sum().clamp_min(1e-300)
    gone = torch.cat([torch.zeros(1, dtype=torch.float64, device=matrix.device), values.double().square().cumsum(0)])
    return tuple(max(0.0, 1 - (gone[min(rank, len(gone) - 1)] / total).item()) for rank in ranks)


def balance(down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with columns of equal length on both sides, so that neither leaves the range of fp16."""
    lengths = [factor.norm(dim=0).clamp_min(1e-30) for factor in (down, up)]  # a column of zeros stays one
    ratio = (lengths[1] / lengths[0]).sqrt()
    return down * ratio, up / ratio


def pad(factor: torch.Tensor, rank: int) -> torch.Tensor:
    """Zero columns up to `rank`: they change nothing but the width, which kernels need in whole tiles."""
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))
