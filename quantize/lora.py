"""A LoRA as columns of the low-rank branch."""

from collections.abc import Iterable

import torch

from ..kernels.layer import LayerSpec
from .linear import LowRank


class LoraError(ValueError):
    """A patch cannot become columns of the low-rank branch. The message says why."""


def columns(
    up: torch.Tensor, down: torch.Tensor, scale: float, offset: tuple[int, int, int] | None, spec: LayerSpec
) -> LowRank:
    """(lora_down, lora_up) with x @ lora_down @ lora_up.T = scale * x @ (up @ down).T on the rows or columns `offset`

    up      (n, r) or (n, r, 1, 1), down (r, k) or (r, k, 1, 1), as LoRA files have them
    offset  (dim, start, length): the part of a fused weight that the LoRA is for, or None for all of it
    raises  LoraError if the factors do not fit the layer
    """
    up, down = up.float().flatten(1), down.float().flatten(1)
    n, k = spec.n, spec.k
    start, rows, inner = (0, n, k) if offset is None else (offset[1], n, k)
    if offset is not None:
        rows, inner = (offset[2], k) if offset[0] == 0 else (n, offset[2])
    if up.shape[0] != rows or down.shape[1] != inner or up.shape[1] != down.shape[0]:
        raise LoraError(
            f"LoRA factors {tuple(up.shape)} and {tuple(down.shape)}, needed ({rows}, r) and (r, {inner}): "
            "it was trained for another model"
        )
    if not (up.isfinite().all() and down.isfinite().all()):
        raise LoraError("the LoRA holds NaN or Inf")
    up, down = up * scale, down.T
    if rows != n:
        up = torch.nn.functional.pad(up, (0, 0, start, n - start - rows))
    if inner != k:
        down = torch.nn.functional.pad(down, (0, 0, start, k - start - inner))
    return down.contiguous(), up.contiguous()


def join(branches: Iterable[LowRank]) -> LowRank | None:
    """One branch that adds up all `branches`; None if there are none."""
    branches = list(branches)
    if not branches:
        return None
    return torch.cat([down for down, _ in branches], 1), torch.cat([up for _, up in branches], 1)
