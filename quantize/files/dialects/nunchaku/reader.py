"""Nunchaku file -> Checkpoint: every stored layer checked from the header, joined or split as ComfyUI has it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .....kernels.formats import SIXTEEN_BIT
from .....kernels.layer import LayerError, LayerSpec
from ....families import FamilyError
from ....families import detect as detect_family
from ...checkpoint import Checkpoint, CheckpointError
from ...header import kept_metadata, provenance_of
from ...tensor_file import TensorFile, TensorInfo
from ...tiles import TILE
from . import header, joins, plain
from .assign import Placement, assign, is_lite_only
from .layers import IGNORED, StoredLayer, inspect_layer, read_bias, read_layer, stored_size
from .stored_file import Draft, StoredFile, group
from .tables import LinearRow, Sizes, StoredName


def open_file(file: TensorFile) -> Checkpoint:
    """A Nunchaku or Nunchaku Lite file under ComfyUI's names. Raises CheckpointError naming layer and reason."""
    stored = group(file)
    names = header.detect_names(stored.file, file.path.name)
    assignment = assign(names, stored.file, file.path.name)
    lite = _is_lite(stored, assignment.linears)
    draft = Draft(stored, lite, Sizes(names.mlp_ratio), header.shape_hints(file))
    plain.bind_sizes(draft, assignment.linears)
    _take_calibrated(stored, assignment.linears)
    notes = (*names.variant(stored.file), *_unalike(stored), *_left_out(stored, assignment.extras))
    for placement in assignment.linears:
        quantized = [name in stored.layers for name in placement.stored]
        with _named(file, placement.stored[0]):
            if all(quantized):
                _add_layers(draft, placement)
            elif any(quantized):
                raise LayerError("is 4-bit in one part and 16-bit in another; one layer has to be one of them")
            else:
                plain.add_linear(draft, placement)
    for host, key in assignment.tensors.items():
        with _named(file, key):
            plain.add_tensor(draft, host, key)
    return replace(_checkpoint(draft, as_is=False), notes=notes)


def open_as_is(file: TensorFile) -> Checkpoint:
    """The same file under its own names, each layer on its own: rows, bias and padding as stored."""
    stored = group(file, as_is=True)
    draft = Draft(stored, header.says_lite(file), Sizes(), header.shape_hints(file))
    unsigned = _unsigned_layers(stored)
    for name, infos in stored.layers.items():
        with _named(file, name):
            layer = _inspect(draft, name, None)
            spec, read = layer.spec, stored.part_reader(name)
            if name in unsigned and spec.fmt.unsigned_act and "bias" in infos:
                spec = replace(spec, act_unsigned=(0, spec.k))
            draft.add_layer(name, spec, partial(read_layer, layer, read))
            if "bias" in infos:
                info = TensorInfo((layer.n,), infos["bias"].dtype)
                draft.add_rest(f"{name}.bias", info, partial(read_bias, layer, read))
    for module, suffixes in stored.plain.items():
        for suffix, info in suffixes.items():
            key = f"{module}.{suffix}" if module else suffix
            draft.add_rest(key, info, partial(stored.read, key))
    return _checkpoint(draft, as_is=True)


def _unsigned_layers(stored: StoredFile) -> set[str]:
    """Layers whose bias holds a shift, where the file is a whole model of a known family; else none can be known."""
    try:
        names = header.detect_names(stored.file, "")
        linears = assign(names, stored.file, "").linears
        lite = _is_lite(stored, linears)
    except CheckpointError:
        return set()
    return set() if lite else {name for name, part in _parts(linears) if part.unsigned}


def _parts(linears: list[Placement]) -> Iterator[tuple[str, StoredName]]:
    """Every stored linear and what the table says of it."""
    for placement in linears:
        yield from zip(placement.stored, placement.linear.spellings[placement.spelling], strict=True)


def _take_calibrated(stored: StoredFile, linears: list[Placement]) -> None:
    for name, part in _parts(linears):
        infos, names = stored.layers.get(name, {}), stored.parts.get(name, {})
        if part.calibrated and IGNORED in infos and infos.get("wscales") and infos["wscales"].dtype in SIXTEEN_BIT:
            infos["smooth_factor"], names["smooth_factor"] = infos[IGNORED], names[IGNORED]


def _left_out(stored: StoredFile, extras: tuple[str, ...]) -> list[str]:
    """Raise CheckpointError for what is no 16-bit tensor."""
    file = stored.file
    for name in extras:
        if not file.infos[name].dtype.is_floating_point:
            raise CheckpointError(
                f"{file.path.name}: {name!r} has no place in the model and is no 16-bit tensor. The file is of another "
                "model, or of a variant that this version does not know."
            )
    if not extras:
        return []
    what = "1 16-bit tensor has" if len(extras) == 1 else f"{len(extras)} 16-bit tensors have"
    return [f"{what} no place in the model and are left out, as Nunchaku does: {', '.join(extras[:3])}"]


class _named:  # noqa: N801 - reads as a statement: with _named(file, layer)
    """Turn a LayerError from the body into a CheckpointError that names file and layer."""

    def __init__(self, file: TensorFile, layer: str) -> None:
        self.place = f"{file.path.name}: layer {layer!r}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, LayerError):
            raise CheckpointError(f"{self.place}: {error}") from error


def _is_lite(stored: StoredFile, linears: list[Placement]) -> bool:
    """Nunchaku or Nunchaku Lite, from names; only where both would have the same names the header decides."""
    quantized = [placement for placement in linears if placement.stored[0] in stored.layers]
    votes = {is_lite_only(placement): placement.stored[0] for placement in quantized}
    if True in votes and False in votes:
        raise CheckpointError(
            f"{stored.file.path.name}: mixes dialects: layer {votes[True]!r} is named as in Nunchaku Lite and "
            f"{votes[False]!r} as in Nunchaku, which differ in the meaning of biases. Write it again from its source."
        )
    return True in votes or (False not in votes and header.says_lite(stored.file))


def _unalike(stored: StoredFile) -> list[str]:
    """What is said of layers that lack what all others have. Nunchaku reads them so: no branch, a scale of 1."""
    notes = []
    for parts, word in (
        (("proj_down",), "low-rank branch: they run without one"),
        (("wtscale", "wcscales"), "scale per tensor or channel: it counts as 1"),
    ):
        scales = "wtscale" in parts
        layers = {
            name: any(part in infos for part in parts)
            for name, infos in stored.layers.items()
            if "wzeros" not in infos
            and (not scales or ("wscales" in infos and infos["wscales"].dtype == torch.float8_e4m3fn))
        }
        without = [name for name, has in layers.items() if not has]
        if without and len(without) < len(layers):
            notes.append(
                f"{len(without)} of {len(layers)} layers, first {without[0]!r}, have no {word}. If pictures are wrong, "
                "the file is not whole: compare its size with the original's"
            )
    return notes


def _inspect(draft: Draft, name: str, part: StoredName | None) -> StoredLayer:
    """Check a stored layer; its logical size comes from the model's own, from a hint in the header, or as stored."""
    infos = draft.stored.layers[name]
    padded = stored_size(infos)
    n, k = draft.hints.get(name, padded)
    if part is not None:
        tile = 1 if "wzeros" in infos else TILE
        hinted = name in draft.hints
        n = draft.sizes.value(part.n) or (n if hinted else draft.sizes.guess(part.n, padded[0], tile))
        k = draft.sizes.value(part.k) or (k if hinted else draft.sizes.guess(part.k, padded[1], tile))
        draft.sizes.bind(part.n, n)
        draft.sizes.bind(part.k, k)
    return inspect_layer(name, infos, n, k)


def _add_layers(draft: Draft, placement: Placement) -> None:
    """The host layers that 4-bit stored layers are: as they are, apart, joined or split."""
    linear, parts = placement.linear, placement.linear.spellings[placement.spelling]
    layers = []
    for name, part in zip(placement.stored, parts, strict=True):
        with _named(draft.stored.file, name):
            layers.append(_inspect(draft, name, part))
    chunks = linear.chunks if not draft.lite and not layers[0].fmt.low_rank else 0
    if chunks and layers[0].n % chunks:
        raise LayerError(f"has {layers[0].n} outputs, needed {chunks} equal chunks")
    specs = [layer.spec for layer in layers]
    for i, (spec, part) in enumerate(zip(specs, parts, strict=True)):
        if part.unsigned and not draft.lite and spec.fmt.unsigned_act:
            specs[i] = replace(spec, act_unsigned=(0, spec.k))
    if placement.apart:
        for host, layer, spec in zip(placement.hosts, layers, specs, strict=True):
            _add_one(draft, host, layer, spec, linear, chunks)
            plain.add_biases(draft, (host,), [layer], linear, chunks)
        return
    if len(layers) > 1:
        _add_joined(draft, placement.hosts[0], layers, specs, linear)
    elif len(placement.hosts) > 1:
        _add_split(draft, placement.hosts, layers[0], specs[0])
    else:
        _add_one(draft, placement.hosts[0], layers[0], specs[0], linear, chunks)
    plain.add_biases(draft, placement.hosts, layers, linear, chunks)


def _add_one(draft: Draft, host: str, layer: StoredLayer, spec: LayerSpec, linear: LinearRow, chunks: int) -> None:
    def read() -> dict[str, torch.Tensor]:
        tensors = draft.stored.read_cached(layer, chunks)
        return joins.swap_halves(tensors, layer.n) if linear.swap else tensors

    draft.add_layer(host, spec, read)


def _add_joined(draft: Draft, host: str, layers: list[StoredLayer], specs: list[LayerSpec], linear: LinearRow) -> None:
    def parts() -> list[dict[str, torch.Tensor]]:
        return [read_layer(layer, draft.stored.part_reader(layer.name)) for layer in layers]

    if linear.join == "columns":
        spec = joins.join_columns_spec(specs)
        joins.check_columns([_upper_scales(draft, layer) for layer in layers])
        draft.add_layer(host, spec, lambda: joins.join_columns(parts()))
    else:
        shared = _share_input(draft, layers)
        draft.add_layer(host, joins.join_rows_spec(specs, shared), lambda: joins.join_rows(parts(), shared))


def _upper_scales(draft: Draft, layer: StoredLayer) -> dict[str, torch.Tensor]:
    read = draft.stored.part_reader(layer.name)
    return {name: read(name).reshape(-1) for name in ("wtscale", "wcscales") if name in layer.parts}


def _share_input(draft: Draft, layers: list[StoredLayer]) -> bool:
    """Whether the parts have the same proj_down. Raises LayerError if they divide by different smooth_factors."""
    reads = [draft.stored.part_reader(layer.name) for layer in layers]
    if not layers[0].fmt.low_rank:
        return True
    smooth = reads[0]("smooth_factor")
    for layer, read in zip(layers[1:], reads[1:], strict=True):
        if not layer.fmt.low_rank or not torch.equal(read("smooth_factor"), smooth):
            raise LayerError(
                f"{layer.name!r} has another smooth_factor. ComfyUI's model has both in one linear, and a 4-bit layer "
                "divides its input once; two divisions behind one linear are not supported. Quantize the model again "
                "with smoothing shared by layers of one input; `python -m quantize convert --as-is` unpacks this one"
            )
    ranks = {layer.rank for layer in layers}
    if len(ranks) > 1 or ranks == {0}:
        return False
    down = reads[0]("proj_down")
    return all(torch.equal(read("proj_down"), down) for read in reads[1:])


def _add_split(draft: Draft, hosts: tuple[str, ...], layer: StoredLayer, spec: LayerSpec) -> None:
    if layer.n % len(hosts):
        raise LayerError(f"has {layer.n} outputs, needed {len(hosts)} equal shares")
    sizes = [layer.n // len(hosts)] * len(hosts)
    blocks = None
    if layer.rank and layer.rank % (joins.RANK_TILE * len(hosts)) == 0:  # else it cannot be block-diagonal
        blocks = joins.rank_blocks(draft.stored.read_cached(layer, 0)["proj_up"], sizes)
    if layer.fmt.low_rank:
        draft.groups.append(hosts)
    for i, host in enumerate(hosts):
        rank = layer.rank if blocks is None else blocks[i].stop - blocks[i].start

        def read(i: int = i) -> dict[str, torch.Tensor]:
            return joins.split_rows(draft.stored.read_cached(layer, 0), sizes, blocks)[i]

        draft.add_layer(host, replace(spec, n=sizes[i], rank=rank), read)


def _checkpoint(draft: Draft, as_is: bool) -> Checkpoint:
    file = draft.stored.file
    header.check_stated(file, draft.specs)
    weights = [*draft.rest, *(f"{name}.weight" for name in draft.specs)]
    try:
        family = "generic" if as_is else detect_family(weights).name
    except FamilyError as error:
        raise CheckpointError(f"{file.path.name}: {error}") from error
    provenance = provenance_of(file, weights, family)
    provenance = replace(provenance, unet_config=header.unet_config(file), groups=tuple(draft.groups))

    def named(readers: Mapping[str, Callable[[], Any]]) -> Callable[[str], Any]:
        def read(name: str) -> Any:
            with _named(file, name):
                return readers[name]()

        return read

    return Checkpoint(
        path=file.path,
        dialect="nunchaku lite" if draft.lite else "nunchaku",
        dtype=_dtype(draft.stored),
        provenance=provenance,
        specs=draft.specs,
        rest=draft.rest,
        _read_layer=named(draft.layer_readers),
        _read_rest=named(draft.rest_readers),
        metadata=kept_metadata(file),
    )


def _dtype(stored: StoredFile) -> torch.dtype:
    """The 16-bit dtype of the 4-bit layers, one for the whole file."""
    found = {
        info.dtype: layer
        for layer, infos in stored.layers.items()
        for info in infos.values()
        if info.dtype in (torch.bfloat16, torch.float16)
    }
    if len(found) > 1:
        raise CheckpointError(
            f"{stored.file.path.name}: layer {found[torch.float16]!r} is float16 and {found[torch.bfloat16]!r} "
            "bfloat16, needed one of them throughout; tensors were mislabelled. Write the file again from its source."
        )
    return next(iter(found), torch.bfloat16)
