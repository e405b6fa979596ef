"""LoRAs made a part of a 4-bit layer: its low-rank branch grows, its 4-bit weight stays bit for bit what it was."""

from dataclasses import dataclass, replace

import torch

from ...kernels.layer import RANK_TILE, Layer
from ..calibration.tokens import InputStatistics
from ..linear import LowRank
from .deltas import Columns
from .fit import LoraLimits, fit
from .loras import LayerLoras

UNSEEN = 0.1  # weight of a channel's size beside the kept tokens: what none of them shows still counts a little


@dataclass(frozen=True)
class BakedLayer:
    """A layer with its LoRAs inside.

    layer  the new layer; None where the format has no low-rank branch and `weight` has to be stored in its place
    lost   share of the LoRAs' energy that the new branch does not hold: of ||x @ delta.T||^2 over activations x that it
           was not fitted to, or, without statistics, of ||delta diag(smooth_factor)||^2
    """

    layer: Layer | None
    weight: torch.Tensor | None
    lost: float


def bake_layer(
    layer: Layer,
    loras: LayerLoras,
    rank: int | None,
    limits: LoraLimits,
    device: torch.device | str = "cpu",
    entry: InputStatistics | None = None,
) -> BakedLayer:
    """proj_up' @ proj_down'.T = proj_up @ proj_down.T + delta

    rank    None: as many columns as base and LoRAs have. A number: the branch of that rank with the least error on
            the activations in `entry`, or, without it, on channels as large as their smooth_factor
    entry   statistics of what the layer reads
    device  where a dense weight is computed, if one is needed; the layer and the result are on the CPU
    raises  LoraError where a LoRA without columns (LoKr, DoRA) is further from any columns than `limits` allow
    """
    spec = layer.spec
    if not spec.fmt.low_rank:
        return BakedLayer(None, loras.dense_weight(layer.dense_weight()), 0.0)
    extra, lost = _columns(layer, loras, limits, device)
    base = _base(layer)
    down, up = (torch.cat(pair, 1) for pair in zip(base, extra, strict=True))
    if rank is not None and rank < down.shape[1]:
        new_down, new_up = _best((down, up), _seen(down, layer, entry, True), rank)
        missed = _energy(_seen(torch.cat([down, -new_down], 1), layer, entry), torch.cat([up, new_up], 1))
        lost += missed / max(_energy(_seen(extra[0], layer, entry), extra[1]), torch.finfo(torch.float32).tiny)
        down, up = new_down, new_up
    dtype = layer["smooth_factor"].dtype
    new = replace(spec, rank=down.shape[1])
    factors = {"proj_down": down.to(dtype).contiguous(), "proj_up": up.to(dtype).contiguous()}
    order = spec.fmt.parts(new.n, new.k, new.rank)
    tensors = {**layer.tensors, **factors}
    return BakedLayer(Layer(new, {name: tensors[name] for name in order if name in tensors}), None, lost)


def _base(layer: Layer) -> LowRank:
    if not layer.spec.rank:
        return torch.zeros(layer.spec.k, 0), torch.zeros(layer.spec.n, 0)
    return layer["proj_down"].float(), layer["proj_up"].float()


def _columns(layer: Layer, loras: LayerLoras, limits: LoraLimits, device: torch.device | str) -> tuple[LowRank, float]:
    """(lora_down, lora_up) of all LoRAs and the share of their energy that they miss."""
    simple = loras.rows is None and loras.cols is None
    if simple and all(isinstance(delta, Columns) for delta in loras.deltas):
        return loras.columns(layer.spec), 0.0
    moved = Layer(layer.spec, {name: tensor.to(device) for name, tensor in layer.tensors.items()})
    weight = moved.dense_weight()
    nearest, kept = fit(loras.dense_weight(weight) - weight, limits)
    return (nearest.down, nearest.up), 1 - kept


def _seen(down: torch.Tensor, layer: Layer, entry: InputStatistics | None, fitting: bool = False) -> torch.Tensor:
    """x @ down for the activations x by which an error counts: those to fit to, or those held out to measure on"""
    if entry is None:
        return layer["smooth_factor"].float()[:, None] * down
    tokens = entry.part(hold=not fitting)[0].float()
    if not len(tokens):
        tokens = entry.part(hold=fitting)[0].float()
    seen = tokens @ down / max(1, len(tokens)) ** 0.5
    return torch.cat([seen, UNSEEN * entry.channel_square().sqrt()[:, None] * down]) if fitting else seen


def _best(factors: LowRank, seen: torch.Tensor, rank: int) -> LowRank:
    """down' = down @ up.T @ up', up' = the `rank` largest directions of the output seen @ up.T, seen = x @ down

    No branch of this rank is nearer on x. No product is formed.
    """
    down, up = factors
    q_up, r_up = torch.linalg.qr(up)
    u, _, _ = torch.linalg.svd(r_up @ torch.linalg.qr(seen)[1].T)
    new_up = q_up @ u[:, :rank]
    new_down = down @ (up.T @ new_up)
    even = (new_down.norm(dim=0) / new_up.norm(dim=0)).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    pad = (0, rank + -rank % RANK_TILE - new_up.shape[1])
    return torch.nn.functional.pad(new_down / even, pad), torch.nn.functional.pad(new_up * even, pad)


def _energy(left: torch.Tensor, up: torch.Tensor) -> float:
    """||left @ up.T||^2 without forming it"""
    left, up = left.double(), up.double()
    return ((up.T @ up) * (left.T @ left)).sum().item()
