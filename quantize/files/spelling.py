"""How layers are spelled under ComfyUI's own names: what every dialect with `comfy_quant` markers shares.

X.<suffix> is one tensor of the layer X; X.comfy_quant, UTF-8 JSON, says what kind of 4-bit layer it is. A tensor that
the table below does not name is stored under the name that its format gives it.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from ...kernels.bounded_json import MARKER as LARGEST_MARKER
from ...kernels.bounded_json import JsonError, read_object
from ...kernels.formats import FORMATS, SIXTEEN_BIT, Format
from ...kernels.layer import LayerError, LayerSpec
from .checkpoint import Checkpoint, CheckpointError
from .tensor_file import TensorFile, TensorInfo

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


def formats_of(dialect: str) -> dict[str, Format]:
    """{name there: format} of every format that names `dialect` in its spellings"""
    return {name: fmt for fmt in FORMATS.values() for name in fmt.spellings.get(dialect, ())}


@cache
def own_names() -> frozenset[str]:
    """Names of tensors that only one format has and that are suffixes themselves.

    raises  ValueError for one that is the suffix of another tensor: the file could not be read again
    """
    names = {part for fmt in FORMATS.values() for part in fmt.part_names} - SUFFIXES.keys()
    taken = sorted(names & {*PARTS, MARKER, "bias"})
    if taken:
        raise ValueError(f"a format has a tensor named {taken[0]}, which files use for another; name it otherwise")
    return frozenset(names)


def suffix_of(part: str) -> str:
    """The suffix of a tensor of a layer. Inverse: `part_of`."""
    return part if part in own_names() else SUFFIXES[part]


def part_of(suffix: str) -> str | None:
    """The tensor that a suffix behind a marked layer means, None if it means none."""
    return PARTS.get(suffix) or (suffix if suffix in own_names() else None)


def marker_tensor(marker: Mapping[str, Any]) -> torch.Tensor:
    """The `comfy_quant` tensor, uint8. Inverse: `read_marker`."""
    return torch.frombuffer(bytearray(json.dumps(marker).encode()), dtype=torch.uint8)


def read_marker(file: TensorFile, layer: str) -> dict[str, Any]:
    """The `comfy_quant` JSON of a layer. Raises LayerError for anything else."""
    name = f"{layer}.{MARKER}"
    size = file.infos[name].nbytes
    if size > LARGEST_MARKER.size:  # before it is read
        raise LayerError(f"{MARKER} has {size:,} bytes, at most {LARGEST_MARKER.size:,} are read")
    try:
        return read_object(bytes(file.read(name).flatten().view(torch.uint8).numpy()), MARKER, limits=LARGEST_MARKER)
    except JsonError as error:
        raise LayerError(str(error)) from error


def marked_layers(file: TensorFile) -> list[str]:
    """The layers that have a marker, in the order of the file."""
    return [name.removesuffix(f".{MARKER}") for name in file if name.endswith(f".{MARKER}")]


def sort_names(
    file: TensorFile, layers: Iterable[str], own: Mapping[str, str] = MappingProxyType({})
) -> tuple[dict[str, dict[str, str]], dict[str, TensorInfo]]:
    """({layer: {part: name}} of the marked `layers`, everything else), biases among it. No tensor is left over.

    own     {suffix: part} that only this dialect has
    raises  CheckpointError for a suffix that no layer has, a part twice, and a part of a layer without marker
    """
    sorted_names: dict[str, dict[str, str]] = {layer: {} for layer in layers}
    rest: dict[str, TensorInfo] = {}
    for name, info in file.infos.items():
        layer, _, suffix = name.rpartition(".")
        marked, part = sorted_names.get(layer), own.get(suffix) or PARTS.get(suffix)
        if marked is not None:
            part = part or part_of(suffix)
            if part is not None and part in marked:
                raise CheckpointError(f"{file.path.name}: layer {layer!r}: {part} is there in two spellings")
            if part is not None:
                marked[part] = name
            elif suffix == "bias":
                rest[name] = info
            elif suffix != MARKER:
                raise CheckpointError(f"{file.path.name}: layer {layer!r}: {suffix} is not part of a 4-bit layer")
        elif part is not None and suffix != "weight":
            raise CheckpointError(
                f"{file.path.name}: {name} belongs to a 4-bit layer, but {layer}.{MARKER} is missing. "
                "The file is damaged or its header was edited."
            )
        elif suffix != MARKER:
            rest[name] = info
    return sorted_names, rest


def name_in_the_way(names: Iterable[str], layers: Collection[str]) -> str | None:
    """A name that means something else in a file with these 4-bit layers than a 16-bit tensor, or None."""
    taken = {*PARTS, MARKER} - {"weight"}
    for name in names:
        layer, _, suffix = name.rpartition(".")
        if suffix in taken or (layer in layers and suffix not in ("weight", "bias")):
            return name
    return None


def check_rest(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a 16-bit tensor that would be taken for a part of a 4-bit layer when it is read."""
    if name := name_in_the_way(checkpoint.rest, checkpoint.specs):
        raise CheckpointError(
            f"{checkpoint.path.name}: {name} is named like a part of a 4-bit layer, and belongs to none. The file "
            "is damaged or its header was edited"
        )


def check_one_dtype(infos: Mapping[str, TensorInfo]) -> None:
    """Raise LayerError for a layer with both kinds of 16-bit floats: then one of them is mislabelled."""
    if {torch.bfloat16, torch.float16} <= {info.dtype for info in infos.values()}:
        raise LayerError("mixes bfloat16 and float16 tensors; the header was edited or the file is damaged")


def check_bias(layer: str, spec: LayerSpec, rest: Mapping[str, TensorInfo]) -> None:
    """Raise LayerError for a bias of another shape, and for none where unsigned activations keep their shift in it."""
    bias = rest.get(f"{layer}.bias")
    if bias is not None and bias.shape != (spec.n,):
        raise LayerError(f"bias has shape {bias.shape}, needed ({spec.n},)")
    if bias is None and spec.act_unsigned != (0, 0):
        raise LayerError("bias is missing; a layer with unsigned activations keeps their shift in it")


def dtype_of(infos: Iterable[TensorInfo]) -> torch.dtype:
    """The 16-bit dtype of the layers; bf16 where they have only 4- and 8-bit tensors."""
    return next((info.dtype for info in infos if info.dtype in SIXTEEN_BIT and info.shape), torch.bfloat16)
