"""The low-rank branch and the user's LoRA as one pair of factors, in the shape the kernels read."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...layer import RANK_TILE, Layer, Lora


class LowRank(NamedTuple):
    """act @ up.T, added to a product: act (M, R), up (N, R), contiguous, R a multiple of RANK_TILE."""

    act: torch.Tensor
    up: torch.Tensor


Beside = Callable[[torch.Tensor | None, Layer, Lora | None], LowRank | None]


def beside(layer: Layer, lora: Lora | None, dtype: torch.dtype) -> Beside:
    """(x @ [proj_down | lora.down * strength], layer, lora) -> it with proj_up and lora.up, for calls like this one

    A rank that is no multiple of RANK_TILE is padded with zeros. The sums are rounded to `dtype`, that of x, between
    the factors, as those of a 16-bit branch are everywhere.
    """
    rank, width = layer.spec.rank, 0 if lora is None else lora.up.shape[1]
    if rank and not width and rank % RANK_TILE == 0 and layer["proj_up"].dtype == dtype:  # as it is
        return lambda act, layer, lora: None if act is None else LowRank(act, layer.tensors["proj_up"])

    def run(act: torch.Tensor | None, layer: Layer, lora: Lora | None) -> LowRank | None:
        if act is None:
            return None
        ups = [layer.tensors.get("proj_up"), None if lora is None else lora.up]
        found = [up if up.dtype == dtype else up.to(dtype) for up in ups if up is not None]
        up = found[0] if len(found) == 1 else torch.cat(found, 1)
        if missing := -up.shape[1] % RANK_TILE:
            act, up = (torch.nn.functional.pad(factor, (0, missing)) for factor in (act, up))
        return LowRank(act, up)

    return run
