"""Checkpoint -> Nunchaku file: ComfyUI's layers split or joined as Nunchaku has them, tiles, padding, header."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .....kernels.formats import FORMATS, STOCK_RULE
from .....kernels.layer import RANK_TILE, Layer, LayerError, LayerSpec, shifted_bias_term
from ....families import FAMILIES
from ...checkpoint import Checkpoint, CheckpointError
from ...header import VERSION
from ...tensor_file import TensorWriter
from ...tiles import TILE
from .. import stock_layer
from . import branches, joins, stated
from .layers import AWQ_GROUP_TILE, NAME, V1, up_to, write_bias, write_layer
from .names import NAME_MAPS
from .save_run import Place, SaveRun, Step, bind_sizes, places, shares
from .tables import Block, LinearRow, Sizes, StoredName, split_name

Tensors = dict[str, torch.Tensor]


def save(checkpoint: Checkpoint, writer: TensorWriter, as_is: bool, step: Step, lite: bool = False) -> list[str]:
    """Write a checkpoint under Nunchaku's names. Inverse: `open_file`, `open_as_is`.

    raises  CheckpointError for a family without Nunchaku names and for layers that these cannot hold
    """
    _check_formats(checkpoint)
    if as_is:
        return _save_as_is(checkpoint, writer, step)
    family = checkpoint.provenance.family
    if family not in NAME_MAPS:
        raise CheckpointError(
            f"{checkpoint.path.name}: Nunchaku has no names for family {family!r}, only for {', '.join(NAME_MAPS)}. "
            "--as-is keeps the names that it has."
        )
    names = NAME_MAPS[family]
    run = SaveRun(checkpoint, writer, names, lite, Sizes(names.mlp_ratio), step)
    run.consumed.update(name for name in names.unwanted if name in checkpoint.rest and not lite)
    found = list(places(run))
    bind_sizes(run, found)
    run.rank = 0 if lite else branches.file_rank(run, found)
    run.skipped |= _skipped(run, found)
    for place in found:
        try:
            _save_linear(run, place)
        except LayerError as error:
            raise CheckpointError(f"{checkpoint.path.name}: layer {run.hosts(place)[0]!r}: {error}") from error
    _save_tensors(run)
    every = [*checkpoint.rest, *(f"{name}.weight" for name in checkpoint.specs)]
    left = sorted(name for name in every if name not in run.consumed)
    if left:
        raise CheckpointError(
            f"{checkpoint.path.name}: {len(left)} tensors have no place in Nunchaku's {family}, first {left[0]!r}"
        )
    writer.metadata |= stated.metadata(run)
    _note_width(run)
    if run.rounded:
        dtype = str(checkpoint.dtype).removeprefix("torch.")
        run.notes.append(f"{len(run.rounded)} tensors were rounded to {dtype}, first {run.rounded[0]}")
    return run.notes


def _note_width(run: SaveRun) -> None:
    """Say what one rank for all layers costs, where it costs something."""
    ranks = [spec.rank for spec in run.checkpoint.specs.values() if spec.fmt.low_rank]
    narrow = up_to(max(ranks, default=0), RANK_TILE)
    if run.rank > narrow:
        run.notes.append(
            f"all layers are stored at rank {run.rank}: Nunchaku has one branch for layers of one input, these have "
            f"one each, of rank {narrow} or less. All are exact; a model quantized with branches=shared needs no more "
            "than its own rank"
        )


def _skipped(run: SaveRun, found: Sequence[Place]) -> dict[str, bool]:
    """Words for the parts of the model, all of whose linears are in 16 bit."""
    hosts: dict[str, set[str]] = {}
    for place in found:
        if word := place[0].skipped:
            hosts.setdefault(word, set()).update(run.hosts(place))
    return {word: True for word, names in hosts.items() if names.isdisjoint(run.checkpoint.specs)}


def _check_formats(checkpoint: Checkpoint) -> None:
    for name, spec in checkpoint.specs.items():
        if NAME not in spec.fmt.spellings:
            held = ", ".join(fmt.name for fmt in FORMATS.values() if NAME in fmt.spellings)
            raise CheckpointError(
                f"{checkpoint.path.name}: layer {name!r} is {spec.format}, and Nunchaku's files hold {held}. Quantize "
                "the 16-bit model to one of these for this dialect."
            )


def _save_as_is(checkpoint: Checkpoint, writer: TensorWriter, step: Step) -> list[str]:
    keys = [f"{name}.qweight" for name in checkpoint.specs]
    v2 = any(names.v2 and names.detect(keys) for names in NAME_MAPS.values())
    biases, shapes = {f"{name}.bias" for name in checkpoint.specs}, dict[str, list[int]]()
    notes: list[str] = []
    for name, spec in checkpoint.specs.items():
        step(name)
        layer = stock_layer(name, checkpoint.layer(name), notes)
        bias = checkpoint.tensor(f"{name}.bias") if f"{name}.bias" in checkpoint.rest else None
        try:
            tensors = write_layer(layer.tensors, layer.spec, group_tile=AWQ_GROUP_TILE)
            for key, tensor in _named_parts(name, layer, tensors, bias, v2).items():
                writer.add(key, tensor)
        except LayerError as error:
            raise CheckpointError(f"{checkpoint.path.name}: layer {name!r}: {error}") from error
        shapes |= _padded_shape(name, spec)
    for name in checkpoint.rest:
        if name not in biases:
            writer.add(name, checkpoint.tensor(name))
    writer.metadata |= dict(checkpoint.metadata)
    if shapes:
        writer.metadata["svdquant"] = json.dumps({"version": VERSION, "shapes": shapes})
    return notes


def _padded_shape(name: str, spec: LayerSpec) -> dict[str, list[int]]:
    padded = spec.fmt.low_rank and (spec.n % TILE or spec.k % TILE)
    return {name: [spec.n, spec.k]} if padded else {}


def _named_parts(
    name: str, layer: Layer, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, v2: bool, chunks: int = 0
) -> Tensors:
    """A stored layer and its bias under their names in the file"""
    suffixes = {} if v2 else V1
    named = {f"{name}.{suffixes.get(part, part)}": tensor for part, tensor in tensors.items()}
    if bias is not None:
        named[f"{name}.bias"] = write_bias(bias, layer.spec, _bias_dtype(layer.tensors, bias), chunks)
    return named


def _bias_dtype(tensors: Mapping[str, torch.Tensor], bias: torch.Tensor) -> torch.dtype:
    """That of the layer's other 16-bit tensors."""
    kinds = {tensors[part].dtype for part in ("wscales", "smooth_factor") if part in tensors}
    return next((kind for kind in (torch.bfloat16, torch.float16) if kind in kinds), bias.dtype)


def _save_linear(run: SaveRun, place: Place) -> None:
    (block, number, linear), hosts = place, run.hosts(place)
    quantized = [host in run.checkpoint.specs for host in hosts]
    plain = [f"{host}.weight" in run.checkpoint.rest for host in hosts]
    if not any(quantized) and not any(plain) and linear.optional:
        return
    if not all(quantized) and not all(plain):
        raise LayerError(
            f"{', '.join(hosts)} have to be there and all 4-bit or all 16-bit, to be one layer in Nunchaku"
        )
    apart = run.lite or (all(plain) and linear.plain == "lite")
    parts = linear.lite if apart and linear.lite else linear.stored
    stored = [block.stored_name(number, part.name) for part in parts]
    if all(plain):
        _check_may_be_plain(run, block, hosts)
        _save_plain(run, hosts, stored, parts, linear)
    else:
        run.step(hosts[0])
        _save_quantized(run, hosts, stored, parts, linear)


def _check_may_be_plain(run: SaveRun, block: Block, hosts: Sequence[str]) -> None:
    """Raise LayerError for a layer in 16 bit that the model's class has in 4 bit: it would not load the file."""
    family, infos = FAMILIES[run.names.name], run.checkpoint.rest
    shapes = {host: infos[f"{host}.weight"].shape for host in hosts}
    if (
        run.lite
        or run.skipped.get(block.skipped)
        or not all(len(shape) == 2 and family.rule(host, *shape) for host, shape in shapes.items())
    ):
        return
    raise LayerError(
        "is in 16 bit, and Nunchaku's class has it in 4 bit: it would not load the file. Quantize the model with 4-bit "
        "modulation and without a fallback to 16 bit; --as-is keeps what there is"
    )


def _save_plain(
    run: SaveRun, hosts: list[str], stored: list[str], parts: Sequence[StoredName], linear: LinearRow
) -> None:
    for suffix in ("weight", "bias"):
        if f"{hosts[0]}.{suffix}" not in run.checkpoint.rest:
            continue
        tensors = [run.take(f"{host}.{suffix}") for host in hosts]
        if linear.swap:
            tensors = [torch.cat(tensor.chunk(2)[::-1]) for tensor in tensors]
        if len(stored) < len(hosts):
            tensors = [torch.cat(tensors)]
        elif len(stored) > len(hosts):
            dim = 1 if linear.join == "columns" else 0
            if dim and suffix == "bias":
                tensors = [torch.zeros_like(tensors[0])] * (len(stored) - 1) + tensors
            else:
                tensors = tensors[0].split(shares(run, linear, parts, tensors[0].shape[dim]), dim)
        for name, tensor in zip(stored, tensors, strict=True):
            run.add(f"{name}.{suffix}", tensor)


def _save_quantized(
    run: SaveRun, hosts: list[str], stored: list[str], parts: Sequence[StoredName], linear: LinearRow
) -> None:
    checkpoint = run.checkpoint
    layers = [stock_layer(host, checkpoint.layer(host), run.notes) for host in hosts]
    biases = [run.take_bias(host) for host in hosts]
    run.consumed.update(f"{host}.weight" for host in hosts)
    if linear.swap:
        layers = [Layer.known(layer.spec, joins.swap_halves(layer.tensors, layer.spec.n)) for layer in layers]
        biases = [None if bias is None else torch.cat(bias.chunk(2)[::-1]) for bias in biases]
    specs, tensors = [layer.spec for layer in layers], [dict(layer.tensors) for layer in layers]
    if len(stored) < len(hosts):
        specs, tensors, biases = _join(layers, biases, hosts)
    elif len(stored) > len(hosts):
        total = specs[0].k if linear.join == "columns" else specs[0].n
        split = _split_columns if linear.join == "columns" else _split_rows
        sizes = shares(run, linear, parts, total)
        specs, tensors, biases = split(specs[0], tensors[0], biases[0], sizes, checkpoint.dtype)
    for name, part, spec, values, bias in zip(stored, parts, specs, tensors, biases, strict=True):
        spec, bias = _with_sign(run, name, part, spec, values, bias)
        _save_part(run, name, Layer.known(spec, values), bias, 0 if spec.fmt.low_rank or run.lite else linear.chunks)


def _save_part(run: SaveRun, name: str, layer: Layer, bias: torch.Tensor | None, chunks: int) -> None:
    """One stored layer, as the model's class has it"""
    spec, values, dtype = layer.spec, layer.tensors, run.checkpoint.dtype
    if bias is None and run.names.zero_biases and not run.lite:
        bias = torch.zeros(spec.n, dtype=dtype)
    if run.rank and spec.fmt.low_rank:
        values, spec = branches.widened(values, spec, run.rank, dtype), replace(spec, rank=run.rank)
    if run.names.row_scales and not run.lite and "wtscale" in values:
        rows = joins.row_factors(values)
        values = {part: tensor for part, tensor in values.items() if part != "wtscale"} | {"wcscales": rows}
    _note_losses(run, name, spec, values)
    layer = Layer.known(spec, values)
    stored = write_layer(values, spec, chunks)
    for key, tensor in _named_parts(name, layer, stored, bias, run.names.v2 or run.lite, chunks).items():
        run.add(key, tensor)
    run.shapes |= _padded_shape(name, spec)
    run.formats[name] = spec


Shares = tuple[list[LayerSpec], list[Tensors], list[torch.Tensor | None]]


def _join(layers: Sequence[Layer], biases: list[torch.Tensor | None], hosts: list[str]) -> Shares:
    """Layers of one input as one. Raises LayerError if they do not divide it by the same smooth_factor."""
    first = layers[0].tensors
    for host, layer in zip(hosts[1:], layers[1:], strict=True):
        if "smooth_factor" in first and not torch.equal(layer["smooth_factor"], first["smooth_factor"]):
            raise LayerError(
                f"has another smooth_factor than {host!r}; Nunchaku stores both as one layer, which has one. "
                "Quantize the model with smoothing shared by layers of one input"
            )
    present = [bias for bias in biases if bias is not None]
    if present and len(present) < len(biases):
        raise LayerError(f"only some of {', '.join(hosts)} have a bias")
    shared = branches.are_shared(layers)
    spec = joins.join_rows_spec([layer.spec for layer in layers], shared)
    tensors = joins.join_rows([layer.tensors for layer in layers], shared)
    return [spec], [tensors], [torch.cat(present) if present else None]


def _split_rows(
    spec: LayerSpec, tensors: Tensors, bias: torch.Tensor | None, shares: list[int], dtype: torch.dtype
) -> Shares:
    blocks = joins.rank_blocks(tensors["proj_up"], shares) if "proj_up" in tensors else None
    split = [_one_scale(part) for part in joins.split_rows(tensors, shares, blocks)]
    specs = [
        replace(spec, n=share, rank=part["proj_up"].shape[1] if "proj_up" in part else 0)
        for share, part in zip(shares, split, strict=True)
    ]
    return specs, split, [None] * len(shares) if bias is None else list(bias.split(shares))


def _one_scale(part: Tensors) -> Tensors:
    """Equal factors per row are one factor per tensor, which is how Nunchaku stores layers that were one linear."""
    if "wcscales" not in part or "wtscale" in part or (part["wcscales"] != part["wcscales"][0]).any():
        return part
    return {name: tensor for name, tensor in part.items() if name != "wcscales"} | {"wtscale": part["wcscales"][0]}


def _split_columns(
    spec: LayerSpec, tensors: Tensors, bias: torch.Tensor | None, shares: list[int], dtype: torch.dtype
) -> Shares:
    """The whole bias goes to the last share, where Nunchaku has it."""
    split = joins.split_columns(tensors, spec, shares, dtype)
    specs, start = [], 0
    for share, part in zip(shares, split, strict=True):
        low, high = (min(max(edge - start, 0), share) for edge in spec.act_unsigned)
        unsigned = (low, high) if low < high else (0, 0)
        rank = part["proj_up"].shape[1] if "proj_up" in part else 0
        specs.append(replace(spec, k=share, rank=rank, act_unsigned=unsigned))
        start += share
    biases: list[torch.Tensor | None] = [None] * len(shares)
    if bias is not None:
        biases = [*([torch.zeros_like(bias)] * (len(shares) - 1)), bias]
    return specs, split, biases


def _with_sign(
    run: SaveRun, name: str, part: StoredName, spec: LayerSpec, tensors: Tensors, bias: torch.Tensor | None
) -> tuple[LayerSpec, torch.Tensor | None]:
    """Make a layer's activations unsigned or signed, as the file's reader will take them; the bias takes the shift."""
    whole = (0, spec.k)
    wanted = whole if part.unsigned and spec.fmt.unsigned_act and not run.lite else (0, 0)
    if spec.act_unsigned == wanted:
        return spec, bias
    bias = torch.zeros(spec.n, dtype=run.checkpoint.dtype) if bias is None else bias
    layer = Layer(spec, tensors)
    bias = layer.unshifted_bias(bias).float()
    if wanted == whole:
        bias = bias - shifted_bias_term(layer.decode_weight(), tensors["smooth_factor"], whole)
    run.notes.append(f"{name}: activations became {'un' if wanted == whole else ''}signed, the bias took the shift")
    return replace(spec, act_unsigned=wanted), bias


def _note_losses(run: SaveRun, name: str, spec: LayerSpec, tensors: Mapping[str, torch.Tensor]) -> None:
    if spec.act_rule != STOCK_RULE:
        run.notes.append(
            f"{name}: the activation rule {spec.act_rule} is not known there, it will run with {STOCK_RULE}"
        )
    if "wzeros" in tensors:
        zeros = tensors["wzeros"].float() - 8 * tensors["wscales"].float()
        if (zeros.to(tensors["wscales"].dtype) != zeros).any():
            run.notes.append(f"{name}: zeros were rounded to 16 bit")


def _save_tensors(run: SaveRun) -> None:
    for block in run.names.blocks:
        table = {**block.tensors, **block.optional_tensors}
        for name in run.checkpoint.rest:
            split = split_name(block.host, name)
            if split is not None and split[1] in table and name not in run.consumed:
                key = table[split[1]][-1 if run.lite else 0]
                run.add(block.stored_name(split[0], key), run.take(name))
