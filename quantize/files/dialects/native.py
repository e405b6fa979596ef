"""The native checkpoint: specification, reader and writer.

One `.safetensors` file. X is ComfyUI's own name of a linear layer, N its out and K its in features, R its rank.

    X.comfy_quant    uint8        UTF-8 JSON, see below; its presence makes X a 4-bit layer
    X.weight         int8         (N, K/2)    4-bit codes, low nibble = even input channel
    X.weight_scale   16-bit       (K/64, N)   int4 and awq_w4a16
                     e4m3         (K/16, N)   nvfp4
    X.weight_scale_2        fp32 or 16-bit  ()     nvfp4, optional: one factor for the tensor
    X.weight_scale_channel  16-bit          (N,)   nvfp4, optional: one factor per output channel
    X.weight_zero    16-bit       (K/64, N)   awq_w4a16
    X.smooth_factor  16-bit       (K,)        int4, nvfp4: the activation is divided by it
    X.proj_down      16-bit       (K, R)      int4, nvfp4, absent at rank 0; sees the activation before smoothing
    X.proj_up        16-bit       (N, R)
    X.bias           16-bit       (N,)        where the layer has one
    X.act_mean       16-bit       (K,)        int4, nvfp4, optional: see below
    X.out_mean       fp32         (N,)        with act_mean

fp32 is legal wherever 16-bit is written. All other tensors are ordinary tensors of the model under ComfyUI's names.

    int4       W[n, k] = signed code * weight_scale[k / 64, n]
    nvfp4      W[n, k] = e2m1(code) * weight_scale[k / 16, n] * weight_scale_2 * weight_scale_channel[n]
    awq_w4a16  W[n, k] = (code - 8) * weight_scale[k / 64, n] + weight_zero[k / 64, n]

    y = Q(x / smooth_factor) @ W.T + (x @ proj_down) @ proj_up.T + bias        (awq_w4a16: y = x @ W.T + bias)

act_mean is what the activation is around. Less is lost when it is taken off before the rounding Q and what that takes
from y, out_mean = W @ (act_mean / smooth_factor), is added again. A reader may ignore both:

    y = Q((x - act_mean) / smooth_factor) @ W.T + out_mean + (x @ proj_down) @ proj_up.T + bias

`comfy_quant` holds
    format      "svdquant_w4a4", "svdquant_w4a4_ranged", "svdquant_nvfp4" or "awq_w4a16"
    group_size  64 or 16
    rank        R
    orig_shape  [N, K]
    act_unsigned        true: every activation is shifted by 0.171875 and quantized to 0..15; the bias then contains
                        -0.171875 * sum_k W[n, k] / smooth_factor[k]
    act_unsigned_range  [start, stop], format svdquant_w4a4_ranged only: the same for these input channels. A format
                        name of its own, so that a reader that does not know ranges stops instead of running signed
    lowrank_branch_input_basis  "raw"
    act_rule    "signed_extreme" (int4) or "four_six" (nvfp4): how activation scales are best chosen, see
                kernels/formats; absent for the stock rule. A reader may ignore it
    act_bits    8 for a layer whose activations should be rounded to 8 bit where there is a choice; absent for 4

The header's metadata (strings) carries
    svdquant     JSON {"version": 1, "family", "pinned", "rank", "formats": {layer: format}, "source_hash"}
    unet_config  JSON, ComfyUI's model configuration as the writing host had it
    recipe       JSON, settings of the quantization

Spelling of svdquant_w4a4 and awq_w4a16: ComfyUI pull request 13580 and the official offline quantizer. The nvfp4 and
ranged formats are extensions of it.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ....kernels.formats import SIXTEEN_BIT
from ....kernels.layer import Layer, LayerError, LayerSpec
from ...families import FamilyError
from ...families import detect as detect_family
from ..checkpoint import Checkpoint, CheckpointError, Provenance
from ..tensor_file import TensorFile, TensorInfo, TensorWriter
from . import Dialect

VERSION = 1
OURS = ("svdquant", "unet_config", "recipe")
MARKER = "comfy_quant"
AFTER_GELU = (
    ".img_mlp.net.2",
    ".txt_mlp.net.2",
)  # Qwen-Image; unsigned unless said otherwise: ComfyUI pull request 13580
SUFFIXES = {
    "qweight": "weight",
    "wscales": "weight_scale",
    "wtscale": "weight_scale_2",
    "wcscales": "weight_scale_channel",
    "wzeros": "weight_zero",
    "smooth_factor": "smooth_factor",
    "proj_down": "proj_down",
    "proj_up": "proj_up",
    "act_mean": "act_mean",
    "out_mean": "out_mean",
}
PARTS = {suffix: part for part, suffix in SUFFIXES.items()}
FORMATS = {"svdquant_w4a4": "int4", "svdquant_w4a4_ranged": "int4", "svdquant_nvfp4": "nvfp4", "awq_w4a16": "awq_w4a16"}


def marker_of(spec: LayerSpec) -> dict[str, Any]:
    """The `comfy_quant` JSON of a layer. Inverse: `spec_of`."""
    start, stop = spec.act_unsigned
    names = {"int4": "svdquant_w4a4", "nvfp4": "svdquant_nvfp4", "awq_w4a16": "awq_w4a16"}
    marker: dict[str, Any] = {"format": names[spec.format], "group_size": spec.fmt.group_size}
    if (start, stop) == (0, spec.k):
        marker["act_unsigned"] = True
    elif start != stop:
        marker |= {"format": "svdquant_w4a4_ranged", "act_unsigned_range": [start, stop]}
    if spec.fmt.low_rank:
        marker |= {"rank": spec.rank, "lowrank_branch_input_basis": "raw"}
    if spec.act_rule != "absmax":
        marker["act_rule"] = spec.act_rule
    if spec.act_bits != 4:
        marker["act_bits"] = spec.act_bits
    return marker | {"orig_shape": [spec.n, spec.k]}


def spec_of(marker: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> LayerSpec:
    """LayerSpec of one layer from its marker and the shapes of its parts, which must agree.

    raises  LayerError
    """
    name = marker.get("format")
    if not isinstance(name, str) or name not in FORMATS:
        raise LayerError(f"format {name!r} is unknown, known are {', '.join(FORMATS)}")
    if "qweight" not in infos:
        raise LayerError("weight is missing")
    shape = infos["qweight"].shape
    if len(shape) != 2:
        raise LayerError(f"weight has shape {shape}, needed (N, K/2)")
    n, k = shape[0], shape[1] * 2
    down = infos.get("proj_down")
    rank = down.shape[1] if down is not None and len(down.shape) == 2 else 0
    channels = [0, k] if marker.get("act_unsigned") is True else marker.get("act_unsigned_range", [0, 0])
    if not (isinstance(channels, list) and len(channels) == 2 and all(type(channel) is int for channel in channels)):
        raise LayerError(f"act_unsigned_range is {channels}, needed [start, stop]")
    act_unsigned = channels[0], channels[1]
    rule, bits = marker.get("act_rule", "absmax"), marker.get("act_bits", 4)
    spec = LayerSpec(FORMATS[name], n, k, rank, act_unsigned, rule, bits)
    stated = {"group_size": spec.fmt.group_size, "rank": rank, "orig_shape": [n, k]}
    for key, value in stated.items():
        if key in marker and marker[key] != value:
            raise LayerError(f"{MARKER} says {key} {marker[key]}, the tensors say {value}")
    if marker.get("lowrank_branch_input_basis", "raw") != "raw":
        raise LayerError(f"low-rank branch in basis {marker['lowrank_branch_input_basis']!r}, needed 'raw'")
    spec.check(infos)
    check_one_dtype(infos)
    return spec


def check_one_dtype(infos: Mapping[str, TensorInfo]) -> None:
    """Raise LayerError for a layer with both kinds of 16-bit floats: then one of them is mislabelled."""
    if {torch.bfloat16, torch.float16} <= {info.dtype for info in infos.values()}:
        raise LayerError("mixes bfloat16 and float16 tensors; the header was edited or the file is damaged")


def _unsigned_by_convention(spec: LayerSpec) -> LayerSpec:
    """Other writers leave act_unsigned out of Qwen-Image's layers behind a GELU and mean true (see AFTER_GELU)."""
    return replace(spec, act_unsigned=(0, spec.k)) if spec.format == "int4" and spec.act_unsigned == (0, 0) else spec


def read_marker(file: TensorFile, layer: str) -> dict[str, Any]:
    """The `comfy_quant` JSON of a layer. Raises LayerError for anything else."""
    try:
        marker = json.loads(bytes(file[f"{layer}.{MARKER}"].flatten().view(torch.uint8).numpy()))
    except (ValueError, RecursionError) as error:
        raise LayerError(f"{MARKER} is not JSON ({error})") from error
    if not isinstance(marker, dict):
        raise LayerError(f"{MARKER} is a {type(marker).__name__}, needed an object")
    return marker


def encode_layer(name: str, layer: Layer) -> dict[str, torch.Tensor]:
    """A layer as tensors of the file. Inverse of reading it."""
    tensors = {f"{name}.{SUFFIXES[part]}": tensor for part, tensor in layer.tensors.items()}
    return {**tensors, f"{name}.{MARKER}": _marker_tensor(layer.spec)}


def _marker_tensor(spec: LayerSpec) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(marker_of(spec)).encode()), dtype=torch.uint8)


def metadata_of(provenance: Provenance, specs: Mapping[str, LayerSpec]) -> dict[str, str]:
    """The header's string table. Inverse: `provenance_of`."""
    svdquant = {
        "version": VERSION,
        "family": provenance.family,
        "pinned": list(provenance.pinned),
        "rank": max((spec.rank for spec in specs.values()), default=0),
        "formats": {name: spec.format for name, spec in specs.items()},
        "source_hash": provenance.source_hash,
    }
    return {
        "svdquant": json.dumps(svdquant),
        "unet_config": json.dumps(dict(provenance.unet_config)),
        "recipe": json.dumps(dict(provenance.recipe)),
    }


def provenance_of(file: TensorFile, weights: Iterable[str], family: str | None = None) -> Provenance:
    """Read the header; where neither it nor the caller says it the family is found from the names of `weights`."""
    try:
        texts = (file.metadata.get(key, "{}") for key in ("svdquant", "unet_config", "recipe"))
        svdquant, config, recipe = map(json.loads, texts)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file.path.name}: the metadata is not JSON ({error})") from error
    _check_types(file, svdquant, config, recipe)
    if svdquant.get("version", VERSION) > VERSION:
        raise CheckpointError(
            f"{file.path.name}: written as version {svdquant['version']} of the native checkpoint, this pack reads "
            f"up to {VERSION}. Update the pack."
        )
    try:
        family = family or svdquant.get("family") or detect_family(weights).name
    except FamilyError as error:
        raise CheckpointError(f"{file.path.name}: {error}") from error
    return Provenance(family, config, tuple(svdquant.get("pinned", ())), recipe, svdquant.get("source_hash", ""))


def _check_types(file: TensorFile, svdquant: object, config: object, recipe: object) -> None:
    objects = {"svdquant": svdquant, "unet_config": config, "recipe": recipe}
    kinds = dict.fromkeys(objects, dict)
    if isinstance(svdquant, dict):
        objects |= svdquant
        kinds |= {"version": int, "family": str, "pinned": list, "formats": dict, "source_hash": str}
    for key, kind in kinds.items():
        if not isinstance(objects.get(key, kind()), kind):
            raise CheckpointError(
                f"{file.path.name}: {key} in the metadata is {objects[key]!r:.40}, needed {kind.__name__}"
            )
    if not all(isinstance(key, str) for key in objects.get("pinned", ())):
        raise CheckpointError(f"{file.path.name}: pinned in the metadata holds more than names")


def _check_stated(file: TensorFile, specs: Mapping[str, LayerSpec]) -> None:
    """Raise CheckpointError where the metadata states another format than a layer's tensors have."""
    for name, stated in json.loads(file.metadata.get("svdquant", "{}")).get("formats", {}).items():
        if name in specs and specs[name].format != stated:
            raise CheckpointError(
                f"{file.path.name}: layer {name!r}: the metadata says {stated}, its tensors are {specs[name].format}. "
                "The header was edited or belongs to another file."
            )


def kept_metadata(file: TensorFile) -> dict[str, str]:
    """Header strings that are not ours and do not repeat what the tensors of one dialect say."""
    return {key: text for key, text in file.metadata.items() if key not in (*OURS, "_quantization_metadata")}


def speaks(file: TensorFile) -> bool:
    from . import kitchen

    return any(name.endswith(f".{MARKER}") for name in file) and not kitchen.speaks(file)


def open_file(file: TensorFile) -> Checkpoint:
    """Check every header entry and return the Checkpoint; no weight is read."""
    marked = (name.removesuffix(f".{MARKER}") for name in file if name.endswith(f".{MARKER}"))
    layers: dict[str, dict[str, str]] = {layer: {} for layer in marked}
    rest: dict[str, TensorInfo] = {}
    for name, info in file.infos.items():
        layer, _, suffix = name.rpartition(".")
        if layer in layers and suffix in PARTS:
            layers[layer][PARTS[suffix]] = name
        elif layer in layers and suffix not in ("bias", MARKER):
            raise CheckpointError(f"{file.path.name}: layer {layer!r}: {suffix} is not part of a 4-bit layer")
        elif suffix in PARTS and suffix != "weight":
            raise CheckpointError(
                f"{file.path.name}: {name} belongs to a 4-bit layer, but {layer}.{MARKER} is missing. "
                "The file is damaged or its header was edited."
            )
        elif suffix != MARKER:
            rest[name] = info
    specs = {}
    for layer, parts in layers.items():
        try:
            marker = read_marker(file, layer)
            specs[layer] = spec_of(marker, {part: file.infos[name] for part, name in parts.items()})
            if "svdquant" not in file.metadata and "act_unsigned" not in marker and layer.endswith(AFTER_GELU):
                specs[layer] = _unsigned_by_convention(specs[layer])
            check_bias(layer, specs[layer], rest)
        except (LayerError, ValueError) as error:
            raise CheckpointError(f"{file.path.name}: layer {layer!r}: {error}") from error
    weights = [*rest, *(f"{layer}.weight" for layer in specs)]
    provenance = provenance_of(file, weights)
    _check_stated(file, specs)
    return Checkpoint(
        path=file.path,
        dialect=DIALECT.name,
        dtype=dtype_of(file.infos[name] for parts in layers.values() for name in parts.values()),
        provenance=provenance,
        specs=specs,
        rest=rest,
        _read_layer=lambda layer: {part: file[name] for part, name in layers[layer].items()},
        _read_rest=file.__getitem__,
        metadata=kept_metadata(file),
    )


def dtype_of(infos: Iterable[TensorInfo]) -> torch.dtype:
    """The 16-bit dtype of the layers; bf16 where they have only 4- and 8-bit tensors."""
    return next((info.dtype for info in infos if info.dtype in SIXTEEN_BIT and info.shape), torch.bfloat16)


def check_bias(layer: str, spec: LayerSpec, rest: Mapping[str, TensorInfo]) -> None:
    bias = rest.get(f"{layer}.bias")
    if bias is not None and bias.shape != (spec.n,):
        raise LayerError(f"bias has shape {bias.shape}, needed ({spec.n},)")
    if bias is None and spec.act_unsigned != (0, 0):
        raise LayerError("bias is missing; a layer with unsigned activations keeps their shift in it")


def save(checkpoint: Checkpoint, writer: TensorWriter, as_is: bool, step: Callable[[str], None]) -> list[str]:
    """Write any checkpoint as a native one; it holds everything. Inverse: `open_file`."""
    for name in checkpoint.specs:
        step(name)
        for key, tensor in encode_layer(name, checkpoint.layer(name)).items():
            writer.add(key, tensor)
    for name in checkpoint.rest:
        writer.add(name, checkpoint.tensor(name))
    writer.metadata |= {**checkpoint.metadata, **metadata_of(checkpoint.provenance, checkpoint.specs)}
    return []


DIALECT = Dialect("native", speaks, open_file, save=save)
