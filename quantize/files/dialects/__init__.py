"""How 4-bit checkpoints are spelled. DIALECTS is what lies in this folder; each reader stands beside its writer."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from ....kernels.discover import modules
from ....kernels.layer import MEANS, Layer
from ..checkpoint import Checkpoint, CheckpointError
from ..tensor_file import TensorFile, TensorWriter

Save = Callable[[Checkpoint, TensorWriter, bool, Callable[[str], None]], list[str]]
"""save(checkpoint, writer, as_is, step) -> notes on what the dialect holds differently

step  is called with the name of each layer before it is written
"""


@dataclass(frozen=True)
class Dialect:
    """One spelling.

    name        as shown to the user
    speaks      whether a file's keys are of this dialect
    open        TensorFile -> Checkpoint under ComfyUI's names, raising CheckpointError
    open_as_is  the same under the file's own names; None where they are ComfyUI's anyway
    save        writes a Checkpoint in this dialect, or says why it cannot; None where that is not possible
    over        names of the dialects that this one extends: a file that both speak is this one's
    """

    name: str
    speaks: Callable[[TensorFile], bool]
    open: Callable[[TensorFile], Checkpoint]
    open_as_is: Callable[[TensorFile], Checkpoint] | None = None
    save: Save | None = None
    over: tuple[str, ...] = ()


def stock_layer(name: str, layer: Layer, notes: list[str]) -> Layer:
    """The layer as other engines know it, without means and at 4-bit activations; `notes` gets a line for each loss."""
    if "act_mean" in layer.tensors:
        kept = {part: tensor for part, tensor in layer.tensors.items() if part not in MEANS}
        layer = replace(layer, tensors=kept)
        notes.append(f"{name}: its act_mean is not known there, it will run with a little more error")
    if layer.spec.act_bits != 4:
        notes.append(f"{name}: {layer.spec.act_bits}-bit activations are not known there, it will run with 4 bit")
        layer = replace(layer, spec=replace(layer.spec, act_bits=4))
    return layer


DIALECTS: dict[str, Dialect] = {module.DIALECT.name: module.DIALECT for module in modules(sys.modules[__name__])}


def speaking(file: TensorFile) -> list[Dialect]:
    """The dialects of a file, without those that another of them extends; empty for a file without 4-bit layers."""
    found = [dialect for dialect in DIALECTS.values() if dialect.speaks(file)]
    extended = {name for dialect in found for name in dialect.over}
    return [dialect for dialect in found if dialect.name not in extended]


def detect(file: TensorFile) -> Dialect:
    """The one dialect of a file, from its keys. Raises CheckpointError that names the fix."""
    found = speaking(file)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(dialect.name for dialect in found)
        raise CheckpointError(f"{file.path.name}: mixes several dialects ({names}); convert its parts separately")
    raise CheckpointError(
        f"{file.path.name}: holds no 4-bit layers, it looks like a plain model. Load it with the Load Diffusion Model "
        "node, or make a 4-bit file of it with the SVDQuant Quantize Model node."
    )
