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
This dialect holds every format there is: one that names no spelling here is "svdquant_" and its own name, and a tensor
that the table does not name has the name that its format gives it.

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

A whole checkpoint, which has VAE and text encoders as well, names the diffusion model's tensors
`model.diffusion_model.X...`, as ComfyUI does; everything else has the names that ComfyUI's checkpoints give it. What
ComfyUI's own save nodes write is that without a header and without checksums: see files/part.py.

The header's metadata (strings) carries
    svdquant     JSON {"version": 1, "family", "pinned", "rank", "formats": {layer: format}, "source_hash", "groups"}
                 groups, absent where there is none: [[layer, ..], ..], layers of one input whose smooth_factor and
                 act_mean are the same numbers, so that it has to be rounded once; proj_down is the same as well where
                 recipe has branches "shared". Each layer is whole without it, and a reader may ignore it
    unet_config  JSON, ComfyUI's model configuration as the writing host had it
    recipe       JSON, settings of the quantization
    svdquant_checksums  JSON, of every tensor and of these strings: see files/integrity.py. A reader may ignore it

Spelling of svdquant_w4a4 and awq_w4a16: ComfyUI pull request 13580 and the official offline quantizer. The nvfp4 and
ranged formats are extensions of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ....kernels.formats import FORMATS, STOCK_RULE, Format
from ....kernels.layer import Layer, LayerError, LayerSpec
from ..checkpoint import Checkpoint, CheckpointError
from ..header import check_stated, kept_metadata, metadata_of, provenance_of
from ..spelling import (
    AFTER_GELU,
    MARKER,
    check_bias,
    check_one_dtype,
    check_rest,
    dtype_of,
    marked_layers,
    marker_tensor,
    read_marker,
    sort_names,
    suffix_of,
)
from ..tensor_file import TensorFile, TensorInfo, TensorWriter
from . import Dialect

NAME = "native"
RANGED = "_ranged"  # behind the name of a format whose unsigned codes hold for a range of the inputs


def names_of(fmt: Format) -> tuple[str, ...]:
    """What a format is called in this dialect, the name that is written first."""
    return fmt.spellings.get(NAME, (f"svdquant_{fmt.name}",))


def format_of(name: object) -> Format:
    """The format that a marker names. Inverse: `names_of`. Raises LayerError for an unknown one."""
    known = {each: fmt for fmt in FORMATS.values() for each in names_of(fmt)}
    known |= {f"{names_of(fmt)[0]}{RANGED}": fmt for fmt in FORMATS.values() if fmt.unsigned_act}
    if not isinstance(name, str) or name not in known:
        raise LayerError(f"format {name!r} is unknown, known are {', '.join(known)}")
    return known[name]


def marker_of(spec: LayerSpec) -> dict[str, Any]:
    """The `comfy_quant` JSON of a layer. Inverse: `spec_of`."""
    start, stop = spec.act_unsigned
    name = names_of(spec.fmt)[0]
    marker: dict[str, Any] = {"format": name, "group_size": spec.fmt.group_size}
    if (start, stop) == (0, spec.k):
        marker["act_unsigned"] = True
    elif start != stop:
        marker |= {"format": f"{name}{RANGED}", "act_unsigned_range": [start, stop]}
    if spec.fmt.low_rank:
        marker |= {"rank": spec.rank, "lowrank_branch_input_basis": "raw"}
    if spec.act_rule != STOCK_RULE:
        marker["act_rule"] = spec.act_rule
    if spec.act_bits != 4:
        marker["act_bits"] = spec.act_bits
    return marker | {"orig_shape": [spec.n, spec.k]}


def spec_of(marker: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> LayerSpec:
    """LayerSpec of one layer from its marker and the shapes of its parts, which must agree.

    raises  LayerError
    """
    fmt = format_of(marker.get("format"))
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
    rule, bits = marker.get("act_rule", STOCK_RULE), marker.get("act_bits", 4)
    spec = LayerSpec(fmt.name, n, k, rank, act_unsigned, rule, bits)
    stated = {"group_size": fmt.group_size, "rank": rank, "orig_shape": [n, k]}
    for key, value in stated.items():
        if key in marker and marker[key] != value:
            raise LayerError(f"{MARKER} says {key} {marker[key]}, the tensors say {value}")
    if marker.get("lowrank_branch_input_basis", "raw") != "raw":
        raise LayerError(f"low-rank branch in basis {marker['lowrank_branch_input_basis']!r}, needed 'raw'")
    spec.check(infos)
    check_one_dtype(infos)
    return spec


def _unsigned_by_convention(spec: LayerSpec) -> LayerSpec:
    """Other writers leave act_unsigned out of Qwen-Image's layers behind a GELU and mean true (see AFTER_GELU)."""
    signed = spec.act_unsigned == (0, 0)
    return replace(spec, act_unsigned=(0, spec.k)) if spec.fmt.unsigned_act and signed else spec


def encode_layer(name: str, layer: Layer) -> dict[str, torch.Tensor]:
    """A layer as tensors of the file. Inverse of reading it."""
    tensors = {f"{name}.{suffix_of(part)}": tensor for part, tensor in layer.tensors.items()}
    return {**tensors, f"{name}.{MARKER}": marker_tensor(marker_of(layer.spec))}


def speaks(file: TensorFile) -> bool:
    """Whether layers are marked; dialects that extend this one say so of theirs."""
    return bool(marked_layers(file))


def open_file(file: TensorFile) -> Checkpoint:
    """Check every header entry and return the Checkpoint; no weight is read."""
    layers, rest = sort_names(file, marked_layers(file))
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
    check_stated(file, specs)
    return Checkpoint(
        path=file.path,
        dialect=NAME,
        dtype=dtype_of(file.infos[name] for parts in layers.values() for name in parts.values()),
        provenance=provenance,
        specs=specs,
        rest=rest,
        _read_layer=lambda layer: {part: file.read(name) for part, name in layers[layer].items()},
        _read_rest=file.read,
        metadata=kept_metadata(file),
    )


def save(checkpoint: Checkpoint, writer: TensorWriter, as_is: bool, step: Callable[[str], None]) -> list[str]:
    """Write any checkpoint as a native one; it holds everything. Inverse: `open_file`. Raises CheckpointError."""
    check_rest(checkpoint)
    for name in checkpoint.specs:
        step(name)
        for key, tensor in encode_layer(name, checkpoint.layer(name)).items():
            writer.add(key, tensor)
    for name in checkpoint.rest:
        writer.add(name, checkpoint.tensor(name))
    writer.metadata |= {**checkpoint.metadata, **metadata_of(checkpoint.provenance, checkpoint.specs)}
    return []


DIALECT = Dialect(NAME, speaks, open_file, save=save)
