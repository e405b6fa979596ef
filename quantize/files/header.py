"""The header's string table of a 4-bit file, whatever its dialect: where the model comes from.

svdquant     JSON {"version": 1, "family", "pinned", "rank", "formats": {layer: format}, "source_hash",
             "groups": [[layer, ..], ..]}, the last where layers read one input
unet_config  JSON, ComfyUI's model configuration as the writing host had it
recipe       JSON, settings of the quantization
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...kernels.bounded_json import JsonError, Kind, read_object
from ...kernels.layer import LayerSpec
from ..families import FamilyError
from ..families import detect as detect_family
from .checkpoint import CheckpointError, Provenance
from .tensor_file import TensorFile

VERSION = 1
OURS = ("svdquant", "unet_config", "recipe")
KINDS: dict[str, Kind] = {
    "version": int,
    "family": str,
    "pinned": list,
    "formats": dict,
    "source_hash": str,
    "groups": list,
}


def entry(file: TensorFile, key: str) -> dict[str, Any]:
    """One JSON object of the header, {} where there is none. Raises CheckpointError for anything else."""
    where = f"{file.path.name}: {key} in the header"
    try:
        return read_object(file.metadata.get(key, "{}"), where, KINDS if key == "svdquant" else None)
    except JsonError as error:
        raise CheckpointError(str(error)) from error


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
    if provenance.groups:
        svdquant["groups"] = [list(group) for group in provenance.groups]
    return {
        "svdquant": json.dumps(svdquant),
        "unet_config": json.dumps(dict(provenance.unet_config)),
        "recipe": json.dumps(dict(provenance.recipe)),
    }


def provenance_of(file: TensorFile, weights: Iterable[str], family: str | None = None) -> Provenance:
    """Read the header; where neither it nor the caller says it the family is found from the names of `weights`."""
    svdquant, config, recipe = (entry(file, key) for key in OURS)
    pinned = svdquant.get("pinned", [])
    if not all(isinstance(key, str) for key in pinned):
        raise CheckpointError(f"{file.path.name}: svdquant in the header: pinned holds more than names")
    if svdquant.get("version", VERSION) > VERSION:
        raise CheckpointError(
            f"{file.path.name}: written as version {svdquant['version']} of the native checkpoint, this pack reads "
            f"up to {VERSION}. Update the pack."
        )
    try:
        family = family or svdquant.get("family") or detect_family(weights).name
    except FamilyError as error:
        raise CheckpointError(f"{file.path.name}: {error}") from error
    return Provenance(family, config, tuple(pinned), recipe, svdquant.get("source_hash", ""), _groups(file, svdquant))


def _groups(file: TensorFile, svdquant: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    groups = svdquant.get("groups", [])
    if not all(isinstance(group, list) and all(isinstance(layer, str) for layer in group) for group in groups):
        raise CheckpointError(f"{file.path.name}: svdquant in the header: groups holds more than lists of layer names")
    return tuple(map(tuple, groups))


def check_stated(file: TensorFile, specs: Mapping[str, LayerSpec]) -> None:
    """Raise CheckpointError where the metadata states another format, or more in common, than the tensors have."""
    for group in _groups(file, entry(file, "svdquant")):
        kinds = {replace(specs[layer], n=0, rank=0) if layer in specs else None for layer in group}
        if len(kinds) > 1 or None in kinds:
            raise CheckpointError(
                f"{file.path.name}: the metadata says that {', '.join(group)} read one input, and they are no 4-bit "
                "layers of one width and kind. The header was edited or belongs to another file."
            )
    for name, stated in entry(file, "svdquant").get("formats", {}).items():
        if name in specs and specs[name].format != stated:
            raise CheckpointError(
                f"{file.path.name}: layer {name!r}: the metadata says {stated}, its tensors are {specs[name].format}. "
                "The header was edited or belongs to another file."
            )


def kept_metadata(file: TensorFile) -> dict[str, str]:
    """Header strings that are not ours and do not repeat what the tensors of one dialect say."""
    return {key: text for key, text in file.metadata.items() if key not in (*OURS, "_quantization_metadata")}
