"""Layers side by side: rows or columns of several 4-bit layers as one, and one as several. Exact in both directions.

rows     y = [y_a, y_b]: outputs side by side. Both have to divide the activation by the same smooth_factor
columns  y = y_a(x_a) + y_b(x_b): inputs side by side, outputs added

The low-rank branches of joined layers become one block-diagonal branch, or stay one where they share proj_down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from .....kernels.layer import RANK_TILE, LayerError, LayerSpec

Tensors = Mapping[str, torch.Tensor]


def join_rows_spec(specs: Sequence[LayerSpec], shared_down: bool) -> LayerSpec:
    """The spec of `join_rows`. Raises LayerError where the layers cannot be one."""
    first = specs[0]
    for spec in specs[1:]:
        if (spec.format, spec.k) != (first.format, first.k):
            raise LayerError(
                f"parts are {first.format} with K={first.k} and {spec.format} with K={spec.k}; "
                "outputs of one layer need the same format and inputs"
            )
    rank = first.rank if shared_down else sum(spec.rank for spec in specs)
    return replace(first, n=sum(spec.n for spec in specs), rank=rank)


def join_rows(parts: Sequence[Tensors], shared_down: bool) -> dict[str, torch.Tensor]:
    """Outputs side by side. Inverse: `split_rows`."""
    joined = {"qweight": torch.cat([part["qweight"] for part in parts])}
    for name in ("wscales", "wzeros"):
        if name in parts[0]:
            joined[name] = torch.cat(
                [part[name].view(torch.uint8) if _is_fp8(part[name]) else part[name] for part in parts], 1
            )
            joined[name] = joined[name].view(parts[0][name].dtype)
    _join_upper_scales(parts, joined)
    if "smooth_factor" in parts[0]:
        joined["smooth_factor"] = parts[0]["smooth_factor"]
    branches = [part for part in parts if "proj_down" in part]
    if branches and shared_down:
        joined["proj_down"] = parts[0]["proj_down"]
        joined["proj_up"] = torch.cat([part["proj_up"] for part in parts])
    elif branches:
        joined["proj_down"] = torch.cat([part["proj_down"] for part in branches], 1)
        joined["proj_up"] = _block_diagonal([part.get("proj_up", _no_columns(part)) for part in parts])
    return joined


def _join_upper_scales(parts: Sequence[Tensors], joined: dict[str, torch.Tensor]) -> None:
    """One factor per tensor stays one if all parts agree, else it becomes one factor per row."""
    present = [part for part in parts if "wtscale" in part or "wcscales" in part]
    if not present:
        return
    first = present[0]
    alike = len(present) == len(parts) and all("wtscale" in part and "wcscales" not in part for part in parts)
    if alike and all(torch.equal(part["wtscale"], first["wtscale"]) for part in parts):
        joined["wtscale"] = first["wtscale"]
        return
    joined["wcscales"] = torch.cat([row_factors(part) for part in parts])


def row_factors(part: Tensors) -> torch.Tensor:
    """One factor above the group scales for each output channel"""
    n = len(part["qweight"])
    if "wtscale" not in part:
        return part["wcscales"] if "wcscales" in part else torch.ones(n)
    if "wcscales" not in part:
        return part["wtscale"].expand(n)
    return part["wtscale"].float() * part["wcscales"].float()


def rank_blocks(proj_up: torch.Tensor, sizes: Sequence[int]) -> list[slice] | None:
    """The columns of a block-diagonal `proj_up` that belong to each share of its rows; None if it is not block-diagonal

    Equal shares of the rank are tried first: that is what joined layers of one file have.
    """
    rank = proj_up.shape[1]
    cuts = []
    if rank % len(sizes) == 0:
        cuts.append([rank // len(sizes) * i for i in range(1, len(sizes))])
    if len(sizes) == 2:
        cuts += [[cut] for cut in range(RANK_TILE, rank, RANK_TILE)]
    for cut in cuts:
        edges = [0, *cut, rank]
        if any(edge % RANK_TILE for edge in edges):
            continue
        columns = [slice(a, b) for a, b in pairwise(edges)]
        shares = proj_up.split(list(sizes))
        if all(
            not share[:, other].any() for i, share in enumerate(shares) for j, other in enumerate(columns) if i != j
        ):
            return columns
    return None


def split_rows(tensors: Tensors, sizes: Sequence[int], blocks: list[slice] | None) -> list[dict[str, torch.Tensor]]:
    """Shares of the outputs. Inverse: `join_rows`.

    blocks  the columns of the branch that belong to each share (`rank_blocks`), or None: all shares have all of it
    """
    found, start = [], 0
    for i, size in enumerate(sizes):
        rows = slice(start, start + size)
        start += size
        part = {"qweight": tensors["qweight"][rows]}
        part |= {name: tensors[name][:, rows] for name in ("wscales", "wzeros") if name in tensors}
        part |= {name: tensors[name] for name in ("smooth_factor", "wtscale") if name in tensors}
        if "wcscales" in tensors:
            part["wcscales"] = tensors["wcscales"][rows]
        if "proj_down" in tensors:
            columns = slice(None) if blocks is None else blocks[i]
            part["proj_down"] = tensors["proj_down"][:, columns]
            part["proj_up"] = tensors["proj_up"][rows, columns]
        found.append({name: tensor.contiguous() for name, tensor in part.items()})
    return found


def join_columns_spec(specs: Sequence[LayerSpec]) -> LayerSpec:
    """The spec of `join_columns`. Raises LayerError where the layers cannot be one."""
    first, k, unsigned = specs[0], 0, []
    for spec in specs:
        if (spec.format, spec.n) != (first.format, first.n):
            raise LayerError(
                f"parts are {first.format} with N={first.n} and {spec.format} with N={spec.n}; "
                "inputs of one layer need the same format and outputs"
            )
        if spec.act_unsigned[0] != spec.act_unsigned[1]:
            unsigned.append((k + spec.act_unsigned[0], k + spec.act_unsigned[1]))
        k += spec.k
    if len(unsigned) > 1:
        raise LayerError(f"unsigned channels {unsigned} are not one range")
    rank = sum(spec.rank for spec in specs)
    return replace(first, k=k, rank=rank, act_unsigned=unsigned[0] if unsigned else (0, 0))


def join_columns(parts: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """Inputs side by side, outputs added; biases are the caller's. Inverse: `split_columns`.

    raises  LayerError where factors above the group scales cannot be one
    """
    parts = _common_scale(parts)
    joined = {"qweight": torch.cat([part["qweight"] for part in parts], 1)}
    scales = [part["wscales"].view(torch.uint8) if _is_fp8(part["wscales"]) else part["wscales"] for part in parts]
    joined["wscales"] = torch.cat(scales).view(parts[0]["wscales"].dtype)
    joined |= {name: parts[0][name] for name in ("wtscale", "wcscales") if name in parts[0]}
    joined["smooth_factor"] = torch.cat([part["smooth_factor"] for part in parts])
    branches = [part for part in parts if "proj_down" in part]
    if branches:
        joined["proj_down"] = _block_diagonal(
            [part.get("proj_down", _no_columns(part, "smooth_factor")) for part in parts]
        )
        joined["proj_up"] = torch.cat([part["proj_up"] for part in branches], 1)
    return joined


def check_columns(parts: Sequence[Tensors]) -> None:
    """Raise LayerError if `join_columns` would; `parts` need only hold wtscale and wcscales."""
    _scale_pair(parts)


def _scale_pair(parts: Sequence[Tensors]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The two factors to bring together, None if there is nothing to do."""
    upper = [part.keys() & {"wtscale", "wcscales"} for part in parts]
    if all(
        names == upper[0] and all(torch.equal(part[name], parts[0][name]) for name in names)
        for names, part in zip(upper, parts, strict=True)
    ):
        return None
    if len(parts) != 2 or any(names != {"wtscale"} for names in upper):
        raise LayerError("parts have different factors per output channel; their columns cannot be one layer")
    a, b = (part["wtscale"].float().reshape(()) for part in parts)
    if not (0 < a < torch.inf and 0 < b < torch.inf):
        raise LayerError(f"wtscale is {a.item()} and {b.item()}, needed positive numbers")
    return a, b


def _common_scale(parts: Sequence[Tensors]) -> Sequence[Tensors]:
    """Two parts with one factor each, t_a and t_b, under the factor t_a * t_b * 2**e, without rounding

    Columns cannot have a factor of their own, but their smooth_factor can take it:
    decode(q) * t_a / s = decode(q) * (t_a * t_b * 2**e) / (s * t_b * 2**e). Products of two 16-bit floats are exact in
    fp32; 2**e brings t_b * 2**e into 1..2, so that the activation keeps its magnitude. wtscale = t_a * 2**e and
    wcscales = t_b keep both factors apart, which makes it reversible: `_own_scales`.
    """
    pair = _scale_pair(parts)
    if pair is None:
        return parts
    a, b = pair
    power = _into_one_two(b)
    upper = {"wtscale": a * power, "wcscales": b.expand(len(parts[0]["qweight"])).contiguous()}
    return [
        {**part, **upper, "smooth_factor": part["smooth_factor"].float() * factor}
        for part, factor in zip(parts, (b * power, a * power), strict=True)
    ]


def _into_one_two(scale: torch.Tensor) -> torch.Tensor:
    """2**e with 1 <= scale * 2**e < 2"""
    return torch.ldexp(torch.ones(()), 1 - torch.frexp(scale).exponent)


def split_columns(
    tensors: Tensors, spec: LayerSpec, sizes: Sequence[int], dtype: torch.dtype
) -> list[dict[str, torch.Tensor]]:
    """Shares of the inputs, whose outputs add up. Inverse: `join_columns`.

    dtype  of 16-bit tensors, to which smooth_factors go back that were joined under a common scale
    """
    blocks = rank_blocks(tensors["proj_down"], sizes) if "proj_down" in tensors else None
    group, found, start = spec.fmt.group_size, [], 0
    for i, size in enumerate(sizes):
        if start % group or size % group:
            raise LayerError(f"inputs {start}:{start + size} are no whole groups of {group}")
        part = {
            "qweight": tensors["qweight"][:, start // 2 : (start + size) // 2],
            "wscales": tensors["wscales"][start // group : (start + size) // group],
            "smooth_factor": tensors["smooth_factor"][start : start + size],
        }
        part |= {name: tensors[name] for name in ("wtscale", "wcscales") if name in tensors}
        if "proj_down" in tensors:
            columns = slice(None) if blocks is None else blocks[i]
            part["proj_down"] = tensors["proj_down"][start : start + size, columns]
            part["proj_up"] = tensors["proj_up"][:, columns]
        start += size
        found.append({name: tensor.contiguous() for name, tensor in part.items()})
    return _own_scales(found, dtype)


def _own_scales(parts: list[dict[str, torch.Tensor]], dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Each part with its own wtscale again, if that is how the layer was joined. Inverse of `_common_scale`."""
    first = parts[0]
    if len(parts) != 2 or "wtscale" not in first or "wcscales" not in first:
        return parts
    joined, b = first["wtscale"].float(), first["wcscales"][0].float()
    if (first["wcscales"] != b).any() or first["smooth_factor"].dtype != torch.float32 or not b > 0:
        return parts
    power = _into_one_two(b)
    smooth = [part["smooth_factor"] / factor for part, factor in zip(parts, (b * power, joined), strict=True)]
    scales = joined / power, b
    if any((value.to(dtype).float() != value).any() for value in (*smooth, *scales)):
        return parts
    return [
        {name: tensor for name, tensor in part.items() if name != "wcscales"}
        | {"smooth_factor": factor.to(dtype), "wtscale": scale.to(dtype)}
        for part, factor, scale in zip(parts, smooth, scales, strict=True)
    ]


def swap_halves(tensors: Tensors, n: int) -> dict[str, torch.Tensor]:
    """The second half of the outputs first. Its own inverse."""
    first, second = split_rows(tensors, (n // 2, n // 2), None)
    return join_rows((second, first), shared_down=True)


def _block_diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch.block_diag for blocks of zero width, without changing their dtype."""
    rows, columns = (sum(block.shape[i] for block in blocks) for i in (0, 1))
    joined = torch.zeros(rows, columns, dtype=next(block.dtype for block in blocks if block.shape[1]))
    row = column = 0
    for block in blocks:
        joined[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return joined


def _no_columns(part: Tensors, like: str = "qweight") -> torch.Tensor:
    return torch.zeros(len(part[like]), 0)


def _is_fp8(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float8_e4m3fn
