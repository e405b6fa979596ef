"""The low-rank branch: split a matrix into a thin product and a rest."""

import torch

OVERSAMPLING = 16
POWER_STEPS = 4


def split(matrix: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) with up @ down.T the best approximation of `matrix` (N, K) of this rank, by randomized SVD

    returns  down (K, R), up (N, R), float32; the singular values are shared evenly. The same seed gives the same bytes.
    """
    n, k = matrix.shape
    rank_found = min(rank, n, k)
    width = rank_found + OVERSAMPLING
    if width >= min(n, k) // 2:  # a full SVD is then as cheap
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.device.type == "cuda" else []):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(matrix, q=width, niter=POWER_STEPS)
    root = s[:rank_found].sqrt()
    down, up = v[:, :rank_found] * root, u[:, :rank_found] * root
    missing = rank - rank_found
    return torch.nn.functional.pad(down, (0, missing)), torch.nn.functional.pad(up, (0, missing))
