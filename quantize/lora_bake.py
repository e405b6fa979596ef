"""LoRAs made a part of a 4-bit layer: its low-rank branch grows, its 4-bit weight stays bit for bit what it was."""

from dataclasses import dataclass

import torch

from ..kernels.layer import Layer, LayerSpec
from .linear import LowRank
from .lora import Branch
from .lora_fit import LoraLimits, fit
from .lora_terms import WIDTH, Columns


@dataclass(frozen=True)
class Baked:
    """A layer with its LoRAs inside.

    layer  the new layer; None where the format has no low-rank branch and `weight` has to be stored in its place
    lost   share of the LoRAs' energy ||delta diag(smooth_factor)||^2 that the new branch does not hold
    """

    layer: Layer | None
    weight: torch.Tensor | None
    lost: float


def bake_layer(
    layer: Layer, branch: Branch, rank: int | None, limits: LoraLimits, device: torch.device | str = "cpu"
) -> Baked:
    """proj_up' @ proj_down'.T = proj_up @ proj_down.T + delta

    rank    None: as many columns as base and LoRAs have. A number: the best branch of that rank, where the error of an
            input channel counts by its smooth_factor, which follows the size of the activation
    device  where a dense weight is computed, if one is needed; the layer and the result are on the CPU
    raises  LoraError where a LoRA without columns (LoKr, DoRA) is further from any columns than `limits` allow
    """
    spec = layer.spec
    if not spec.fmt.low_rank:
        return Baked(None, branch.dense_weight(layer.dense_weight()), 0.0)
    extra, lost = _columns(layer, branch, limits, device)
    base = _base(layer)
    down, up = (torch.cat(pair, 1) for pair in zip(base, extra, strict=True))
    if rank is not None and rank < down.shape[1]:
        smooth = layer["smooth_factor"].float()
        whole, delta = (down * smooth[:, None], up), (extra[0] * smooth[:, None], extra[1])
        (down, up), missed = _best(whole, rank)
        down = down / smooth[:, None]
        lost += missed / max(_energy(delta), torch.finfo(torch.float32).tiny)
    dtype = layer["smooth_factor"].dtype
    new = LayerSpec(spec.format, spec.n, spec.k, down.shape[1], spec.act_unsigned)
    factors = {"proj_down": down.to(dtype).contiguous(), "proj_up": up.to(dtype).contiguous()}
    order = spec.fmt.parts(new.n, new.k, new.rank)
    tensors = {**layer.tensors, **factors}
    return Baked(Layer(new, {name: tensors[name] for name in order if name in tensors}), None, lost)


def _base(layer: Layer) -> LowRank:
    if not layer.spec.rank:
        return torch.zeros(layer.spec.k, 0), torch.zeros(layer.spec.n, 0)
    return layer["proj_down"].float(), layer["proj_up"].float()


def _columns(layer: Layer, branch: Branch, limits: LoraLimits, device: torch.device | str) -> tuple[LowRank, float]:
    """(lora_down, lora_up) of the whole branch and the share of its energy that they miss."""
    simple = branch.rows is None and branch.cols is None
    if simple and all(isinstance(part, Columns) for part in branch.parts):
        return branch.columns(layer.spec), 0.0
    moved = Layer(layer.spec, {name: tensor.to(device) for name, tensor in layer.tensors.items()})
    weight = moved.dense_weight()
    found = fit(branch.dense_weight(weight) - weight, limits)
    return (found.part.down, found.part.up), 1 - found.kept


def _best(factors: LowRank, rank: int) -> tuple[LowRank, float]:
    """The best columns of this rank for down, up, and the energy they miss; the product is never formed."""
    down, up = factors
    (q_down, r_down), (q_up, r_up) = torch.linalg.qr(down), torch.linalg.qr(up)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    root = s[:rank].sqrt()
    new = (q_down @ vh.T)[:, :rank] * root, (q_up @ u)[:, :rank] * root
    missing = rank + -rank % WIDTH - new[0].shape[1]
    padded = tuple(torch.nn.functional.pad(side, (0, missing)) for side in new)
    return padded, s[rank:].double().square().sum().item()


def _energy(factors: LowRank) -> float:
    """||up @ down.T||^2 without forming it"""
    down, up = (side.double() for side in factors)
    return ((up.T @ up) * (down.T @ down)).sum().item()
