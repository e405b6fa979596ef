"""The low-rank branches of a whole file at one rank: the model's class has one for all layers.

Branches of layers side by side are one branch where they share proj_down, and else stand in it as blocks: exact, but
as wide as all of them together, and every other layer gets columns of zeros up to that. Cutting them to a common rank
is no way: what was rounded to 4 bit completes the branch that it was made with.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from .....kernels.layer import RANK_TILE, Layer, LayerSpec
from . import joins
from .layers import up_to
from .save_run import Place, SaveRun, shares

Tensors = Mapping[str, torch.Tensor]


def file_rank(run: SaveRun, found: Iterable[Place]) -> int:
    """The largest rank that a stored layer has; layers are read where only their branches say it"""
    specs, most = run.checkpoint.specs, RANK_TILE
    unknown: list[tuple[int, list[str], Place]] = []
    for place in found:
        hosts, linear = run.hosts(place), place[2]
        if not all(host in specs and specs[host].fmt.low_rank for host in hosts):
            continue
        if len(linear.stored) == len(hosts):
            most = max(most, *(specs[host].rank for host in hosts))
        else:
            unknown.append((sum(specs[host].rank for host in hosts), hosts, place))
    for widest, hosts, place in sorted(unknown, key=lambda one: -one[0]):
        if widest > most:
            layers = [run.checkpoint.layer(host) for host in hosts]
            most = max(most, _rank_of_parts(run, layers[0], place) if len(layers) == 1 else joined_rank(layers))
    return up_to(most, RANK_TILE)


def joined_rank(layers: Sequence[Layer]) -> int:
    """The rank of layers side by side: that of one where they share proj_down, else of all together"""
    return layers[0].spec.rank if are_shared(layers) else sum(layer.spec.rank for layer in layers)


def are_shared(layers: Sequence[Layer]) -> bool:
    """Whether layers have one proj_down"""
    downs = [layer.tensors.get("proj_down") for layer in layers]
    first = downs[0]
    return first is not None and all(down is not None and torch.equal(down, first) for down in downs)


def _rank_of_parts(run: SaveRun, layer: Layer, place: Place) -> int:
    """The largest rank of the parts that a layer is taken apart into"""
    spec, linear = layer.spec, place[2]
    columns = linear.join == "columns"
    sizes = shares(run, linear, linear.stored, spec.k if columns else spec.n)
    blocks = joins.rank_blocks(layer["proj_down" if columns else "proj_up"], sizes)
    return spec.rank if blocks is None else max(block.stop - block.start for block in blocks)


def widened(tensors: Tensors, spec: LayerSpec, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors with columns of zeros up to `rank`: they change nothing but the width"""
    made = dict(tensors)
    for name, rows in (("proj_down", spec.k), ("proj_up", spec.n)):
        factor = made.get(name)
        if factor is None:
            factor = torch.zeros(rows, 0, dtype=dtype)
        made[name] = torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))
    return made
