"""The checkpoints of comfy-kitchen: specification, reader and writer. INT4 and AWQ, under ComfyUI's layer names.

Two spellings are read; the writer uses the first. The second, in natural order, is that of the native checkpoint.

    X.comfy_quant           X.comfy_quant      uint8 JSON, or the same objects in the header's `_quantization_metadata`
    X.weight                X.weight           int8  (N, K/2) or, tile-packed, (N/128, K/64, 32, 128)
    X.weight_scale          X.weight_scale     16-bit (K/64, N) or (N/128, K/64, 128)
    X.weight_proj_down      X.proj_down        16-bit (K, R)
    X.weight_proj_up        X.proj_up          16-bit (N, R) or (N/128, R, 128)
    X.weight_smooth_factor  X.smooth_factor    16-bit (K,)
    X.weight_zeros          X.weight_zero      16-bit (K/64, N), awq_w4a16 only
    X.bias                  X.bias             16-bit (N,)

    comfy_quant  {"format": "svdquant_w4a4" | "awq_w4a16", "group_size": 64, "act_unsigned", "layout", "rank",
                  "orig_shape", "lowrank_branch_input_basis": "raw" | "post_smoothing", "proj_down_smooth_folded"}

`post_smoothing` (the same as proj_down not folded): proj_down sees the activation after the division, so it is divided
by smooth_factor when it is read. A missing act_unsigned means true for the layers of Qwen-Image behind a GELU
(ComfyUI pull request 13580), false for all others. There is no NVFP4 with a low-rank branch in this dialect, and
act_unsigned holds for a whole layer or not at all.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ....kernels.bounded_json import JsonError, read_object
from ....kernels.formats import STOCK_RULE
from ....kernels.layer import RANK_TILE, Layer, LayerError, LayerSpec
from .. import spelling
from .. import tiles as layout
from ..checkpoint import Checkpoint, CheckpointError
from ..header import kept_metadata, metadata_of, provenance_of
from ..spelling import MARKER, formats_of, marker_tensor, read_marker
from ..tensor_file import TensorFile, TensorInfo, TensorWriter
from . import Dialect, stock_layer

NAME = "kitchen"
TILE_PACKED = "kitchen_tile_packed_w4a4"
OWN = {  # suffixes that only this dialect has
    "weight_proj_down": "proj_down",
    "weight_proj_up": "proj_up",
    "weight_smooth_factor": "smooth_factor",
    "weight_zeros": "wzeros",
}
PARTS = {**OWN, **spelling.PARTS}
SUFFIXES = {part: suffix for suffix, part in OWN.items()}
LOWEST_RANK = RANK_TILE  # the kernels want a branch


def speaks(file: TensorFile) -> bool:
    """Whether some layer is spelled as only this dialect does."""
    marked = spelling.marked_layers(file)
    if any(name.rpartition(".")[2] in OWN for name in file):
        return bool(marked) or bool(_stated(file))
    if not marked:
        return bool(_stated(file))
    for layer in marked:
        weight = file.infos.get(f"{layer}.weight")
        if weight is not None and len(weight.shape) == 4:
            return True
        try:
            marker = read_marker(file, layer)
        except LayerError:
            return False  # the native reader will say so
        if marker.get("lowrank_branch_input_basis", "raw") != "raw" or marker.get("proj_down_smooth_folded") is False:
            return True
    return False


def _stated(file: TensorFile) -> dict[str, dict[str, Any]]:
    """Our formats' layers in the header's `_quantization_metadata`."""
    try:
        layers = read_object(file.metadata.get("_quantization_metadata", "{}"), "_quantization_metadata")["layers"]
        return {name: marker for name, marker in layers.items() if marker["format"] in tuple(formats_of(NAME))}
    except (JsonError, TypeError, KeyError, AttributeError):
        return {}


def markers(file: TensorFile) -> dict[str, dict[str, Any]]:
    """layer -> its `comfy_quant` object, from tensors and header, which must not contradict each other."""
    found = _stated(file)
    for layer in spelling.marked_layers(file):
        marker = read_marker(file, layer)
        for key in marker.keys() & found.get(layer, {}).keys():
            if marker[key] != found[layer][key]:
                raise LayerError(f"{layer}: the header says {key} {found[layer][key]}, comfy_quant says {marker[key]}")
        found[layer] = marker
    return found


def open_file(file: TensorFile) -> Checkpoint:
    """Check every header entry and return the Checkpoint; no weight is read."""
    try:
        marked = markers(file)
    except LayerError as error:
        raise CheckpointError(f"{file.path.name}: {error}") from error
    layers, rest = spelling.sort_names(file, marked, OWN)
    specs = {}
    for layer, parts in layers.items():
        try:
            infos = {part: file.infos[name] for part, name in parts.items()}
            specs[layer] = spec_of(layer, marked[layer], infos)
            spelling.check_bias(layer, specs[layer], rest)
        except LayerError as error:
            raise CheckpointError(f"{file.path.name}: layer {layer!r}: {error}") from error
    weights = [*rest, *(f"{layer}.weight" for layer in specs)]

    def read_layer(layer: str) -> dict[str, torch.Tensor]:
        return _natural({part: file.read(name) for part, name in layers[layer].items()}, marked[layer])

    return Checkpoint(
        path=file.path,
        dialect=NAME,
        dtype=spelling.dtype_of(file.infos[name] for parts in layers.values() for name in parts.values()),
        provenance=provenance_of(file, weights),
        specs=specs,
        rest=rest,
        _read_layer=read_layer,
        _read_rest=file.read,
        metadata=kept_metadata(file),
    )


def spec_of(layer: str, marker: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> LayerSpec:
    """LayerSpec of one layer from its marker and the shapes of its parts, which must agree. Raises LayerError."""
    name, known = marker.get("format"), formats_of(NAME)
    if not isinstance(name, str) or name not in known:
        raise LayerError(f"format {name!r} is unknown, known are {', '.join(known)}")
    fmt = known[name]
    if "qweight" not in infos:
        raise LayerError("weight is missing")
    natural = _natural_infos(infos)
    shape = natural["qweight"].shape
    if len(shape) != 2:
        raise LayerError(f"weight has shape {shape}, needed (N, K/2) or (N/128, K/64, 32, 128)")
    stated_layout = marker.get("layout")
    if stated_layout == TILE_PACKED and len(infos["qweight"].shape) != 4:
        raise LayerError(f"layout is {TILE_PACKED}, weight has shape {shape}, needed (N/128, K/64, 32, 128)")
    n, k = shape[0], shape[1] * 2
    down = natural.get("proj_down")
    rank = down.shape[1] if down is not None and len(down.shape) == 2 else 0
    if rank == 0:
        natural = {part: info for part, info in natural.items() if part not in ("proj_down", "proj_up")}
    unsigned = marker.get("act_unsigned", fmt.unsigned_act and layer.endswith(spelling.AFTER_GELU))
    if not isinstance(unsigned, bool):
        raise LayerError(f"act_unsigned is {unsigned!r}, needed true or false")
    act_unsigned = (0, k) if unsigned else (0, 0)
    spec = LayerSpec(fmt.name, n, k, rank, act_unsigned, marker.get("act_rule", STOCK_RULE))
    for key, value in {"group_size": fmt.group_size, "rank": rank, "orig_shape": [n, k]}.items():
        if key in marker and marker[key] != value:
            raise LayerError(f"{MARKER} says {key} {marker[key]}, the tensors say {value}")
    _is_after_smoothing(marker)
    spec.check(natural)
    spelling.check_one_dtype(infos)
    return spec


def _is_after_smoothing(marker: Mapping[str, Any]) -> bool:
    """Whether proj_down sees the activation after the division. Raises LayerError for a contradiction."""
    basis, folded = marker.get("lowrank_branch_input_basis"), marker.get("proj_down_smooth_folded")
    if basis not in (None, "raw", "post_smoothing") or folded not in (None, True, False):
        raise LayerError(f"low-rank branch in basis {basis!r}, folded {folded!r}; needed 'raw' or 'post_smoothing'")
    if basis is not None and folded is not None and (basis == "raw") != folded:
        raise LayerError(f"low-rank branch in basis {basis!r} with proj_down_smooth_folded {folded}: contradiction")
    return basis == "post_smoothing" or folded is False


def _natural_infos(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Shapes as they will be in natural order. Raises LayerError for tiles of another size."""
    found = dict(infos)
    packed = {"qweight": 4, "wscales": 3, "proj_up": 3}
    tiled = [part for part, dims in packed.items() if part in infos and len(infos[part].shape) == dims]
    if not tiled:
        return found
    if len(infos["qweight"].shape) != 4 or any(part not in tiled for part in packed if part in infos):
        raise LayerError(f"is tile-packed in {', '.join(tiled)} only, needed in all parts or none")
    tiles, groups, quads, width = infos["qweight"].shape
    if (quads, width) != (32, layout.TILE):
        raise LayerError(f"weight has shape {infos['qweight'].shape}, needed (N/128, K/64, 32, 128)")
    found["qweight"] = TensorInfo((tiles * layout.TILE, groups * quads), infos["qweight"].dtype)
    for part in ("wscales", "proj_up"):
        if part in infos:
            tiles, rows, width = infos[part].shape
            if width != layout.TILE:
                raise LayerError(f"{part} has shape {infos[part].shape}, needed {layout.TILE} in the last dimension")
            n = tiles * layout.TILE
            found[part] = TensorInfo((rows, n) if part == "wscales" else (n, rows), infos[part].dtype)
    return found


def _natural(tensors: dict[str, torch.Tensor], marker: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Natural order, low-rank branch on the raw activation. Inverse of what `encode_layer` does to tiles."""
    if tensors["qweight"].dim() == 4:
        tensors["qweight"] = layout.unpack_kitchen_weight(tensors["qweight"])
        tensors["wscales"] = layout.unpack_kitchen_rows(tensors["wscales"])
        if "proj_up" in tensors:
            tensors["proj_up"] = layout.unpack_kitchen_rows(tensors["proj_up"]).T.contiguous()
    if "proj_down" in tensors and not tensors["proj_down"].numel():
        del tensors["proj_down"], tensors["proj_up"]
    if _is_after_smoothing(marker) and "proj_down" in tensors:
        tensors["proj_down"] = tensors["proj_down"].float() / tensors["smooth_factor"].float()[:, None]
    return tensors


def marker_of(spec: LayerSpec, tile_packed: bool = False) -> dict[str, Any]:
    """The `comfy_quant` object of a layer. Inverse: `spec_of`."""
    name, group = spec.fmt.spellings[NAME][0], spec.fmt.group_size
    marker: dict[str, Any] = {"format": name, "group_size": group, "orig_shape": [spec.n, spec.k]}
    if spec.fmt.low_rank:
        marker |= {"act_unsigned": spec.act_unsigned == (0, spec.k), "rank": spec.rank}
        marker |= {"lowrank_branch_input_basis": "raw", "proj_down_smooth_folded": True}
        if tile_packed:
            marker["layout"] = TILE_PACKED
    if spec.act_rule != STOCK_RULE:
        marker["act_rule"] = spec.act_rule
    return marker


def with_branch(layer: Layer) -> Layer:
    """The layer as comfy-kitchen's kernels want it: with a branch, of zeros at rank 0, and its zeros in 16 bit."""
    spec, tensors = layer.spec, dict(layer.tensors)
    if "wzeros" in tensors:
        tensors["wzeros"] = tensors["wzeros"].to(tensors["wscales"].dtype)
    if spec.fmt.low_rank and spec.rank == 0:
        spec, dtype = replace(spec, rank=LOWEST_RANK), tensors["smooth_factor"].dtype
        tensors["proj_down"] = torch.zeros(spec.k, LOWEST_RANK, dtype=dtype)
        tensors["proj_up"] = torch.zeros(spec.n, LOWEST_RANK, dtype=dtype)
    return replace(layer, spec=spec, tensors=tensors)


def encode_layer(name: str, layer: Layer, tile_packed: bool = False) -> dict[str, torch.Tensor]:
    """A layer as tensors of the file. Inverse of reading it, where `refusal` and `notes` have nothing to say.

    raises  LayerError for a layer that this dialect cannot hold
    """
    layer = with_branch(layer)
    spec, tensors = layer.spec, dict(layer.tensors)
    if tile_packed and spec.fmt.low_rank:
        if spec.n % layout.TILE:
            raise LayerError(f"N={spec.n} is not a multiple of {layout.TILE}, which tile-packing needs")
        tensors["qweight"] = layout.pack_kitchen_weight(tensors["qweight"])
        tensors["wscales"] = layout.pack_kitchen_rows(tensors["wscales"])
        tensors["proj_up"] = layout.pack_kitchen_rows(tensors["proj_up"].T)
    written = {f"{name}.{SUFFIXES.get(part) or spelling.suffix_of(part)}": tensors[part] for part in tensors}
    return written | {f"{name}.{MARKER}": marker_tensor(marker_of(spec, tile_packed))}


def refusal(spec: LayerSpec) -> str | None:
    """Why this dialect cannot hold a layer, None if it can."""
    if NAME not in spec.fmt.spellings:
        return f"is {spec.format}, and comfy-kitchen has no {spec.format} layer with smoothing and a low-rank branch"
    return None


def save(
    checkpoint: Checkpoint,
    writer: TensorWriter,
    as_is: bool,
    step: Callable[[str], None],
    tile_packed: bool = False,
) -> list[str]:
    """Write a checkpoint in natural order. Inverse: `open_file`. Raises CheckpointError for what cannot be held."""
    for name, spec in checkpoint.specs.items():
        reason = refusal(spec)
        if reason:
            raise CheckpointError(
                f"{checkpoint.path.name}: layer {name!r} {reason}. Quantize the 16-bit model to "
                f"{' or '.join(fmt.name for fmt in formats_of(NAME).values() if fmt.low_rank)} for this dialect."
            )

    def encode(name: str, layer: Layer, notes: list[str]) -> dict[str, torch.Tensor]:
        return encode_layer(name, layer, tile_packed)

    return save_layers(checkpoint, writer, step, encode)


def save_layers(
    checkpoint: Checkpoint,
    writer: TensorWriter,
    step: Callable[[str], None],
    encode: Callable[[str, Layer, list[str]], dict[str, torch.Tensor]],
) -> list[str]:
    """Write a checkpoint for engines that know neither means nor 8-bit activations nor ranges of unsigned ones.

    encode   (name, layer without these, notes) -> its tensors in the file
    returns  a line for each layer that is held differently
    """
    spelling.check_rest(checkpoint)
    notes: list[str] = []
    written: dict[str, torch.Tensor] = {}
    for name, spec in checkpoint.specs.items():
        step(name)
        layer = stock_layer(name, checkpoint.layer(name), notes)
        if spec.partly_unsigned:
            bias = f"{name}.bias"
            written[bias] = layer.unshifted_bias(checkpoint.tensor(bias)).float()
            layer = replace(layer, spec=replace(layer.spec, act_unsigned=(0, 0)))
            notes.append(f"{name}: unsigned activations in a part of the inputs became signed, the shift left the bias")
        if "wzeros" in layer.tensors and (layer["wzeros"].to(layer["wscales"].dtype) != layer["wzeros"]).any():
            notes.append(f"{name}: zeros were rounded to 16 bit")
        for key, tensor in encode(name, layer, notes).items():
            writer.add(key, tensor)
    for name in checkpoint.rest:
        writer.add(name, written[name] if name in written else checkpoint.tensor(name))
    writer.metadata |= {**checkpoint.metadata, **metadata_of(checkpoint.provenance, {})}
    return notes


DIALECT = Dialect(NAME, speaks, open_file, save=save, over=("native",))
