"""A checkpoint dialect in one file: layers are marked as in the native one, their tensors have suffixes of their own.

    X.comfy_quant     as in the native checkpoint
    X.dummy_<tensor>  what the native checkpoint spells by its table, e.g. X.dummy_qweight

Its files have native markers, so the native dialect speaks them as well: `over` says whose they are.
"""

from collections.abc import Callable

from ....kernels.layer import LayerError
from ..checkpoint import Checkpoint, CheckpointError
from ..header import kept_metadata, metadata_of, provenance_of
from ..spelling import MARKER, check_bias, dtype_of, marked_layers, marker_tensor, read_marker
from ..tensor_file import TensorFile, TensorWriter
from . import Dialect
from .native import marker_of, spec_of

NAME = "dummy"
PREFIX = "dummy_"


def speaks(file: TensorFile) -> bool:
    return any(name.rpartition(".")[2].startswith(PREFIX) for name in file)


def open_file(file: TensorFile) -> Checkpoint:
    """Check every layer's tensors against its marker; no weight is read."""
    layers: dict[str, dict[str, str]] = {layer: {} for layer in marked_layers(file)}
    rest = {}
    for name, info in file.infos.items():
        layer, _, suffix = name.rpartition(".")
        if layer in layers and suffix.startswith(PREFIX):
            layers[layer][suffix.removeprefix(PREFIX)] = name
        elif suffix != MARKER:
            rest[name] = info
    specs = {}
    for layer, parts in layers.items():
        try:
            specs[layer] = spec_of(read_marker(file, layer), {part: file.infos[name] for part, name in parts.items()})
            check_bias(layer, specs[layer], rest)
        except LayerError as error:
            raise CheckpointError(f"{file.path.name}: layer {layer!r}: {error}") from error
    return Checkpoint(
        path=file.path,
        dialect=NAME,
        dtype=dtype_of(file.infos[name] for parts in layers.values() for name in parts.values()),
        provenance=provenance_of(file, [*rest, *(f"{layer}.weight" for layer in specs)]),
        specs=specs,
        rest=rest,
        _read_layer=lambda layer: {part: file.read(name) for part, name in layers[layer].items()},
        _read_rest=file.read,
        metadata=kept_metadata(file),
    )


def save(checkpoint: Checkpoint, writer: TensorWriter, as_is: bool, step: Callable[[str], None]) -> list[str]:
    """Write any checkpoint. Inverse: `open_file`."""
    for name, spec in checkpoint.specs.items():
        step(name)
        for part, tensor in checkpoint.layer(name).tensors.items():
            writer.add(f"{name}.{PREFIX}{part}", tensor)
        writer.add(f"{name}.{MARKER}", marker_tensor(marker_of(spec)))
    for name in checkpoint.rest:
        writer.add(name, checkpoint.tensor(name))
    writer.metadata |= {**checkpoint.metadata, **metadata_of(checkpoint.provenance, checkpoint.specs)}
    return []


DIALECT = Dialect(NAME, speaks, open_file, save=save, over=("native",))
