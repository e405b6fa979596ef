"""The low-rank branch and the user's LoRA as one pair of factors, in the shape the kernels read."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...layer import RANK_TILE, Layer, Lora
from ...stages import weigh_


class LowRank(NamedTuple):
    """act @ up.T, added to a product: act (M, R), up (N, R), contiguous, R a multiple of RANK_TILE."""

    act: torch.Tensor
    up: torch.Tensor


Beside = Callable[[torch.Tensor, Layer, torch.Tensor | None, Lora | None], LowRank | None]


def side_by_side(pairs: list[LowRank], dtype: torch.dtype) -> LowRank:
    """act @ up.T = the sum over `pairs` of act (M, R_i) @ up (N, R_i).T, of which there is at least one

    Ranks are padded with zeros to a multiple of RANK_TILE together.
    """
    acts, ups = (
        [each if each.dtype == dtype else each.to(dtype) for each in side] for side in zip(*pairs, strict=True)
    )
    act, up = (acts[0], ups[0]) if len(pairs) == 1 else (torch.cat(acts, 1), torch.cat(ups, 1))
    if missing := -up.shape[1] % RANK_TILE:
        act, up = (torch.nn.functional.pad(factor, (0, missing)) for factor in (act, up))
    return LowRank(act, up)


def beside(layer: Layer, lora: Lora | None, dtype: torch.dtype) -> Beside:
    """(x, layer, x @ proj_down, lora) -> the layer's branch and the LoRA as one pair of factors, for calls like this

    The branch is rounded to `dtype`, that of x, between its two factors, as a 16-bit branch is everywhere.
    """
    rank, width = layer.spec.rank, 0 if lora is None else lora.up.shape[1]
    if not width:
        if rank and rank % RANK_TILE == 0 and layer["proj_up"].dtype == dtype:  # as it is
            return lambda x, layer, act, lora: None if act is None else LowRank(act, layer.tensors["proj_up"])
        return lambda x, layer, act, lora: (
            side_by_side([LowRank(act, layer["proj_up"])], dtype) if rank and act is not None else None
        )

    def run(x: torch.Tensor, layer: Layer, act: torch.Tensor | None, lora: Lora | None) -> LowRank:
        assert lora is not None  # calls are alike
        down, up, strength = lora
        mine = LowRank(weigh_(x @ (down if down.dtype == dtype else down.to(dtype)), strength), up)
        return side_by_side(
            [LowRank(act, layer.tensors["proj_up"]), mine] if rank and act is not None else [mine], dtype
        )

    return run
