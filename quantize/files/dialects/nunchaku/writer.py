"""Checkpoint -> Nunchaku file: ComfyUI's layers split or joined as Nunchaku has them, tiles, padding, header."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from .....kernels.bounded_json import read_object
from .....kernels.formats import DEFAULT, FORMATS, STOCK_RULE, Format
from .....kernels.layer import RANK_TILE, Layer, LayerError, LayerSpec, shifted_bias_term
from ...checkpoint import Checkpoint, CheckpointError
from ...header import VERSION, metadata_of
from ...tensor_file import TensorWriter
from ...tiles import TILE
from .. import stock_layer
from . import joins
from .layers import NAME, V1, has_byte_scales, up_to, write_bias, write_layer
from .names import NAME_MAPS
from .tables import Block, LinearRow, NameMap, Sizes, StoredName, split_name

Step = Callable[[str], None]
Tensors = dict[str, torch.Tensor]


@dataclass
class SaveRun:
    """One run of the writer.

    lite      Nunchaku Lite: Diffusers' names, signed activations, modulation as it is
    shapes    stored layer -> logical [N, K], of padded layers
    consumed  ComfyUI's tensor names that are written
    """

    checkpoint: Checkpoint
    writer: TensorWriter
    names: NameMap
    lite: bool
    sizes: Sizes
    step: Step
    shapes: dict[str, list[int]] = field(default_factory=dict)
    formats: dict[str, LayerSpec] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    consumed: set[str] = field(default_factory=set)

    def take(self, name: str) -> torch.Tensor:
        self.consumed.add(name)
        return self.checkpoint.tensor(name)

    def take_bias(self, layer: str) -> torch.Tensor | None:
        return self.take(f"{layer}.bias") if f"{layer}.bias" in self.checkpoint.rest else None


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
    places = list(_places(run))
    _bind_sizes(run, places)
    for block, number, linear in places:
        host = block.host_name(number, linear.host[0])
        try:
            _save_linear(run, block, number, linear)
        except LayerError as error:
            raise CheckpointError(f"{checkpoint.path.name}: layer {host!r}: {error}") from error
    _save_tensors(run)
    every = [*checkpoint.rest, *(f"{name}.weight" for name in checkpoint.specs)]
    left = sorted(name for name in every if name not in run.consumed)
    if left:
        raise CheckpointError(
            f"{checkpoint.path.name}: {len(left)} tensors have no place in Nunchaku's {family}, first {left[0]!r}"
        )
    writer.metadata |= _metadata(run)
    return run.notes


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
            _add_layer(writer, name, layer, bias, v2)
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


def _add_layer(
    writer: TensorWriter, name: str, layer: Layer, bias: torch.Tensor | None, v2: bool, chunks: int = 0
) -> None:
    suffixes = {} if v2 else V1
    for part, tensor in write_layer(layer.tensors, layer.spec, chunks).items():
        writer.add(f"{name}.{suffixes.get(part, part)}", tensor)
    if bias is not None:
        writer.add(f"{name}.bias", write_bias(bias, layer.spec, _bias_dtype(layer.tensors, bias), chunks))


def _bias_dtype(tensors: Mapping[str, torch.Tensor], bias: torch.Tensor) -> torch.dtype:
    """That of the layer's other 16-bit tensors."""
    kinds = {tensors[part].dtype for part in ("wscales", "smooth_factor") if part in tensors}
    return next((kind for kind in (torch.bfloat16, torch.float16) if kind in kinds), bias.dtype)


def _places(run: SaveRun) -> Iterable[tuple[Block, int | None, LinearRow]]:
    """Every linear that the model has, block after block."""
    every = [*run.checkpoint.specs, *(name.rpartition(".")[0] for name in run.checkpoint.rest)]
    for block in run.names.blocks:
        known = {host for linear in block.linears for host in linear.host}
        numbers = {split[0] for name in every if (split := split_name(block.host, name)) and split[1] in known}
        for number in sorted(numbers, key=lambda number: number or 0):
            for linear in block.linears:
                yield block, number, linear


def _bind_sizes(run: SaveRun, places: Sequence[tuple[Block, int | None, LinearRow]]) -> None:
    infos = run.checkpoint.weight_infos()
    for block, number, linear in places:
        if len(linear.host) == len(linear.stored) == 1:
            info = infos.get(f"{block.host_name(number, linear.host[0])}.weight")
            if info is not None and len(info.shape) == 2:
                run.sizes.bind(linear.stored[0].n, info.shape[0])
                run.sizes.bind(linear.stored[0].k, info.shape[1])


def _save_linear(run: SaveRun, block: Block, number: int | None, linear: LinearRow) -> None:
    hosts = [block.host_name(number, host) for host in linear.host]
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
        _save_plain(run, hosts, stored, parts, linear)
    else:
        run.step(hosts[0])
        _save_quantized(run, hosts, stored, parts, linear)


def _shares(run: SaveRun, linear: LinearRow, parts: Sequence[StoredName], total: int) -> list[int]:
    """How `total` rows (or columns) of a joined linear divide among its parts; one size may follow from the others."""
    texts = [part.k if linear.join == "columns" else part.n for part in parts]
    sizes = [run.sizes.value(text) for text in texts]
    unknown = [i for i, size in enumerate(sizes) if size is None]
    if len(unknown) == 1:
        remaining = total - sum(size for size in sizes if size is not None)
        sizes[unknown[0]] = remaining
        run.sizes.bind(texts[unknown[0]], remaining)
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or sum(known) != total or min(known) <= 0:
        raise LayerError(f"{total} {linear.join} do not divide into {', '.join(part.name for part in parts)}: {sizes}")
    return known


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
                tensors = tensors[0].split(_shares(run, linear, parts, tensors[0].shape[dim]), dim)
        for name, tensor in zip(stored, tensors, strict=True):
            run.writer.add(f"{name}.{suffix}", tensor.contiguous())


def _save_quantized(
    run: SaveRun, hosts: list[str], stored: list[str], parts: Sequence[StoredName], linear: LinearRow
) -> None:
    checkpoint = run.checkpoint
    layers = [stock_layer(host, checkpoint.layer(host), run.notes) for host in hosts]
    biases = [run.take_bias(host) for host in hosts]
    run.consumed.update(f"{host}.weight" for host in hosts)
    specs, tensors = [layer.spec for layer in layers], [dict(layer.tensors) for layer in layers]
    if linear.swap:
        tensors = [joins.swap_halves(part, spec.n) for part, spec in zip(tensors, specs, strict=True)]
        biases = [None if bias is None else torch.cat(bias.chunk(2)[::-1]) for bias in biases]
    if len(stored) < len(hosts):
        specs, tensors, biases = _join(specs, tensors, biases, hosts)
    elif len(stored) > len(hosts):
        total = specs[0].k if linear.join == "columns" else specs[0].n
        shares = _shares(run, linear, parts, total)
        split = _split_columns if linear.join == "columns" else _split_rows
        specs, tensors, biases = split(specs[0], tensors[0], biases[0], shares, checkpoint.dtype)
    chunks = 0 if run.lite else linear.chunks
    for name, part, spec, values, bias in zip(stored, parts, specs, tensors, biases, strict=True):
        spec, bias = _with_sign(run, name, part, spec, values, bias)
        if bias is None and run.names.zero_biases and not run.lite:
            bias = torch.zeros(spec.n, dtype=checkpoint.dtype)
        chunked = 0 if spec.fmt.low_rank else chunks
        _note_losses(run, name, spec, values)
        _add_layer(run.writer, name, Layer.known(spec, values), bias, run.names.v2 or run.lite, chunked)
        run.shapes |= _padded_shape(name, spec)
        run.formats[name] = spec


Shares = tuple[list[LayerSpec], list[Tensors], list[torch.Tensor | None]]


def _join(
    specs: list[LayerSpec], tensors: list[Tensors], biases: list[torch.Tensor | None], hosts: list[str]
) -> Shares:
    """Layers of one input as one. Raises LayerError if they do not divide it by the same smooth_factor."""
    first = tensors[0]
    for host, part in zip(hosts[1:], tensors[1:], strict=True):
        if "smooth_factor" in first and not torch.equal(part["smooth_factor"], first["smooth_factor"]):
            raise LayerError(
                f"has another smooth_factor than {host!r}; Nunchaku stores both as one layer, which has one. "
                "Quantize the model with smoothing shared by layers of one input"
            )
    downs = [part.get("proj_down") for part in tensors]
    shared = all(down is not None and downs[0] is not None and torch.equal(down, downs[0]) for down in downs)
    spec = joins.join_rows_spec(specs, shared)
    present = [bias for bias in biases if bias is not None]
    if len(present) < len(biases):
        if present:
            raise LayerError(f"only some of {', '.join(hosts)} have a bias")
        return [spec], [joins.join_rows(tensors, shared)], [None]
    return [spec], [joins.join_rows(tensors, shared)], [torch.cat(present)]


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


def _note_losses(run: SaveRun, name: str, spec: LayerSpec, tensors: Tensors) -> None:
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
            if split is not None and split[1] in table:
                stored = table[split[1]]
                key = stored[-1] if run.lite else stored[0]
                run.writer.add(block.stored_name(split[0], key), run.take(name))


def _metadata(run: SaveRun) -> dict[str, str]:
    checkpoint, names = run.checkpoint, run.names
    kept = {key: text for key, text in checkpoint.metadata.items() if key != "quantization_config"}
    ours = metadata_of(checkpoint.provenance, {})
    if run.shapes:
        ours["svdquant"] = json.dumps({**read_object(ours["svdquant"], "svdquant"), "shapes": run.shapes})
    made = {"config": json.dumps({"_class_name": names.class_name}), "model_class": names.model_class}
    if names.name == "flux" and checkpoint.provenance.unet_config:
        config = dict(checkpoint.provenance.unet_config)
        model_class = "Flux" if config.get("guidance_embed") else "FluxSchnell"
        made["comfy_config"] = json.dumps({"model_class": model_class, "model_config": config})
    stated = _lite_config(run.formats) if run.lite else _quantization_config(run.formats)
    return {**made, **kept, **ours, "quantization_config": json.dumps(stated)}


def _quantization_config(specs: dict[str, LayerSpec]) -> dict:
    """As Nunchaku writes it; the rank is that of most layers, rounded up as stored."""
    layers = [spec for spec in specs.values() if spec.fmt.low_rank]
    ranks = [up_to(spec.rank, RANK_TILE) for spec in layers]
    rank = max(set(ranks), key=ranks.count, default=0)
    fmt = layers[0].fmt if layers else FORMATS[DEFAULT]
    scale = "fp8_e4m3_nan" if has_byte_scales(fmt) else None
    kind = {"dtype": fmt.spellings[NAME][0], "scale_dtype": scale and [None, scale], "group_size": fmt.group_size}
    return {"method": "svdquant", "weight": kind, "activation": {**kind, "scale_dtype": scale}, "rank": rank}


def _lite_config(specs: dict[str, LayerSpec]) -> dict:
    config: dict = {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16"}
    w4a4 = {name: spec for name, spec in specs.items() if spec.fmt.low_rank}
    if w4a4:
        first, rank = next(iter(w4a4.values())), _quantization_config(w4a4)["rank"]
        config["svdq_w4a4"] = {**_lite_kind(first.fmt), "rank": rank, "targets": list(w4a4)}
    w4a16 = {name: spec for name, spec in specs.items() if name not in w4a4}
    if w4a16:
        fmt = next(iter(w4a16.values())).fmt
        config[fmt.spellings[NAME][0]] = {**_lite_kind(fmt), "targets": list(w4a16)}
    return config


def _lite_kind(fmt: Format) -> dict:
    return {"precision": fmt.spellings["nunchaku lite"][0], "group_size": fmt.group_size}
