"""The low-rank branch and the user's LoRA as one pair of factors, in the shape the kernels read."""

import torch

from ...layer import RANK_TILE


def side_by_side(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """(act, up) with act @ up.T the sum over `pairs` of act (M, R_i) @ up (N, R_i).T; ranks padded to 16 together."""
    pairs = [(act, up) for act, up in pairs if up.shape[1]]
    if not pairs:
        return None, None
    act, up = (torch.cat([pair[side].to(dtype) for pair in pairs], dim=1) for side in (0, 1))
    if missing := -up.shape[1] % RANK_TILE:
        act, up = (torch.nn.functional.pad(factor, (0, missing)) for factor in (act, up))
    return act.contiguous(), up.contiguous()
