"""Patches that are no plain LoRA, brought into factored form: exact where that is cheap, else the nearest columns."""

from dataclasses import dataclass

import torch

from ...kernels.layer import RANK_TILE
from .deltas import Columns, Delta, Kron, LoraError, Offset, check_finite, columns_of, plain, span

NOTHING = 1e-6  # share of a delta's energy that is rounding: columns that hold no more than it are left out
KRON_COLUMNS = 64  # a Kronecker product of at most this rank is faster as columns of the fused kernel
LOHA_COLUMNS = 512  # a Hadamard product of at most this rank is kept exact


@dataclass(frozen=True)
class LoraLimits:
    """How far a patch without an exact form may be approximated.

    max_rank  columns that one patch may take in one layer, a multiple of RANK_TILE
    max_lost  share of the patch's energy ||delta||^2 that may be lost in a layer; above it the patch is refused
    """

    max_rank: int = 256
    max_lost: float = 0.02


def fit(delta: torch.Tensor, limits: LoraLimits, seed: int = 0) -> tuple[Columns, float]:
    """up @ down.T ~ delta (N, K), the best columns of the least rank that loses nothing, or of limits.max_rank

    returns (columns, share of ||delta||^2 in them)
    raises  LoraError when more than limits.max_lost of the energy would be lost, or for NaN or Inf
    """
    check_finite(delta)
    n, k = delta.shape
    total = delta.double().square().sum().item()
    if total == 0:
        return Columns(torch.zeros(k, RANK_TILE), torch.zeros(n, RANK_TILE)), 1.0
    for rank in sorted({min(48, limits.max_rank), limits.max_rank}):
        u, s, v = _svd(delta, rank, seed)
        held = s.double().square().cumsum(0)
        lost = max(0.0, 1 - held[min(rank, len(s)) - 1].item() / total)
        if lost <= NOTHING:
            break
    if lost > limits.max_lost:
        raise LoraError(
            f"it has no exact form on a 4-bit layer, and the nearest {rank} columns keep {1 - lost:.1%} of its "
            f"energy; at least {1 - limits.max_lost:.1%} is asked for (SVDQuant LoRA Limits sets both numbers)"
        )
    enough = int((held[-1] - held > NOTHING * total).sum().item()) + 1
    width = min(rank, enough, len(s))
    root = s[:width].sqrt()
    pad = (0, -width % RANK_TILE)
    down, up = (torch.nn.functional.pad(side[:, :width] * root, pad).cpu() for side in (v, u))
    return Columns(down, up), 1 - lost


def _svd(delta: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(u, s, v) with at least `rank` singular values where the matrix has them; the same seed gives the same bits"""
    width = rank + RANK_TILE
    if 2 * width >= min(delta.shape):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        return u, s, vh.T
    with torch.random.fork_rng(devices=[delta.device] if delta.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return torch.svd_lowrank(delta, q=width, niter=4)


def hadamard(
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    offset: Offset | None,
    shape: tuple[int, int],
    limits: LoraLimits,
) -> tuple[Columns, float]:
    """(a1 @ b1) * (a2 @ b2) as columns: row-wise products of a1 with a2, column-wise of b1 with b2 (LoHa)

    Exact while r1 * r2 is at most LOHA_COLUMNS, else truncated. returns (columns, share of the energy in them)
    """
    (a1, b1), (a2, b2) = (tuple(map(plain, pair)) for pair in (first, second))
    rows, cols = span(offset, shape)
    ranks = a1.shape[1], a2.shape[1]
    fitting = [a.shape[0] == rows[1] and b.shape == (a.shape[1], cols[1]) for a, b in ((a1, b1), (a2, b2))]
    if not all(fitting):
        shapes = ", ".join(str(tuple(factor.shape)) for factor in (a1, b1, a2, b2))
        raise LoraError(f"LoHa factors {shapes} do not fit ({rows[1]}, {cols[1]}): it was trained for another model")
    check_finite(a1, b1, a2, b2)
    a1, b1, a2, b2 = (factor.float() for factor in (a1, b1, a2, b2))
    if ranks[0] * ranks[1] <= LOHA_COLUMNS:
        up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
        return columns_of([(up, down, offset)], shape), 1.0
    nearest, kept = fit((a1 @ b1) * (a2 @ b2), limits)
    return columns_of([(nearest.up, nearest.down.T, offset)], shape), kept


def kronecker(
    left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...], offset: Offset | None, shape: tuple[int, int]
) -> Delta:
    """kron(left, right), each one factor or a product of two (LoKr); exact in either form

    raises  LoraError if the product does not have the shape of the (part of the) weight
    """
    left, right = tuple(map(plain, left)), tuple(map(plain, right))
    rows, cols = span(offset, shape)
    check_finite(*left, *right)
    inner = [pair[0].shape[1] == pair[1].shape[0] for pair in (left, right) if len(pair) == 2]
    product = left[0].shape[0] * right[0].shape[0], left[-1].shape[1] * right[-1].shape[1]
    if not all(inner) or product != (rows[1], cols[1]):
        raise LoraError(f"LoKr factors give {product}, needed {(rows[1], cols[1])}: it was trained for another model")
    sides = [_two_factors(side) for side in (left, right)]
    if sides[0][0].shape[1] * sides[1][0].shape[1] <= KRON_COLUMNS:
        up, down = (torch.kron(sides[0][i].float(), sides[1][i].float()) for i in (0, 1))
        return columns_of([(up, down, offset)], shape)
    whole = left[0] if len(left) == 1 else left[0].float() @ left[1].float()
    return Kron(whole.clone(), tuple(factor.clone() for factor in right), rows, cols)


def _two_factors(side: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A product of two matrices as it is; one matrix beside the smaller identity that leaves it unchanged."""
    if len(side) == 2:
        return side[0], side[1]
    n, k = side[0].shape
    eye = torch.eye(min(n, k), dtype=side[0].dtype, device=side[0].device)
    return (side[0], eye) if k <= n else (eye, side[0])


@dataclass(frozen=True, eq=False)
class Dora:
    """W' = W + strength * (diag(rows) (W + delta) diag(cols) - W), with the magnitude over the norm in rows or cols."""

    rows: torch.Tensor | None
    cols: torch.Tensor | None


def dora(magnitude: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor | None, offset: Offset | None) -> Dora:
    """The factors of a weight-decomposed LoRA: magnitude / norm, as vectors of the whole layer

    magnitude  (n, 1): of every output channel, over the norm of its row of `weight`;
               (1, k): of every input channel, over the norm of its column of `weight + delta`
    weight     (N, K) float32 as it is before this patch; delta (n, k), needed for (1, k) only
    raises     LoraError where the factors would not be a diagonal of the layer
    """
    n, k = weight.shape
    rows, cols = span(offset, (n, k))
    part = weight[rows[0] : sum(rows), cols[0] : sum(cols)]
    magnitude = plain(magnitude)
    if not magnitude.isfinite().all():
        raise LoraError("the DoRA magnitude holds NaN or Inf")
    tiny = torch.finfo(torch.float32).eps  # as the host has it
    values = magnitude.float().to(weight.device)
    if tuple(values.shape[:2]) == (rows[1], 1) and values.numel() == rows[1]:
        if cols[1] != weight.shape[1]:
            raise LoraError("a DoRA magnitude of output channels on a part of the input channels has no exact form")
        factor = torch.ones(weight.shape[0], device=weight.device)
        factor[rows[0] : sum(rows)] = values.flatten() / (part.norm(dim=1) + tiny)
        return Dora(factor, None)
    if values.shape[0] == 1 and values.numel() == cols[1]:
        if rows[1] != weight.shape[0]:
            raise LoraError("a DoRA magnitude of input channels on a part of the output channels has no exact form")
        assert delta is not None, "a magnitude of input channels is over the norm of weight + delta"
        factor = torch.ones(weight.shape[1], device=weight.device)
        factor[cols[0] : sum(cols)] = values.flatten() / ((part + delta).norm(dim=0) + tiny)
        return Dora(None, factor)
    raise LoraError(f"the DoRA magnitude has shape {tuple(magnitude.shape)}, needed ({rows[1]}, 1) or (1, {cols[1]})")
