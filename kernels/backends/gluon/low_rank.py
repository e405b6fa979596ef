"""The low-rank branch and the user's LoRA as one pair of factors, in the shape the kernels read."""

from typing import NamedTuple

import torch

from ...layer import RANK_TILE


class LowRank(NamedTuple):
    """act @ up.T, added to a product: act (M, R), up (N, R), contiguous, R a multiple of RANK_TILE."""

    act: torch.Tensor
    up: torch.Tensor


def side_by_side(pairs: list[LowRank], dtype: torch.dtype) -> LowRank | None:
    """act @ up.T = the sum over `pairs` of act (M, R_i) @ up (N, R_i).T; None where there is nothing to add

    Ranks are padded with zeros to a multiple of RANK_TILE together.
    """
    pairs = [pair for pair in pairs if pair.up.shape[1]]
    if not pairs:
        return None
    if len(pairs) == 1:
        act, up = pairs[0].act.to(dtype), pairs[0].up.to(dtype)
    else:
        act, up = (torch.cat([pair[side].to(dtype) for pair in pairs], dim=1) for side in (0, 1))
    if missing := -up.shape[1] % RANK_TILE:
        act, up = (torch.nn.functional.pad(factor, (0, missing)) for factor in (act, up))
    return LowRank(act.contiguous(), up.contiguous())
