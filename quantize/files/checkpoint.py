"""A 4-bit model on disk, whatever its dialect: names and shapes at once, tensors layer by layer.

Dialects (how a file spells its layers) live in `dialects/`; each turns a TensorFile into a Checkpoint.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...kernels import COMPUTES, computes_of
from ...kernels.layer import Layer, LayerError, LayerSpec, check_values
from .tensor_file import METADATA_ROOM, ROOM_PER_EXTRA_TENSOR, TensorFileError, TensorInfo, TensorWriter

FLOATS = ("weight", "bias", "scale")  # what ends so in a 16-bit model is never a tensor of integers


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names file, layer, what was found and what was needed."""


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from and what it pins of the model that is built for it.

    family       name of the model family
    unet_config  ComfyUI's model configuration, as the host had it that wrote the file; a record
    pinned       keys of unet_config that a host cannot find from the tensors and must take from here
    recipe       settings of the run that made the file
    source_hash  sha256 over names and bytes of the 16-bit source tensors
    groups       layers that read one input and have the same smooth_factor and act_mean: it has to be rounded once
    """

    family: str = "generic"
    unet_config: Mapping[str, Any] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source_hash: str = ""
    groups: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """An opened 4-bit model.

    dialect     how the file is spelled
    dtype       of its 16-bit tensors
    specs       layer name -> LayerSpec of every 4-bit layer, under ComfyUI's layer names
    rest        tensor name -> TensorInfo of everything else, biases of 4-bit layers included
    metadata    header strings that mean nothing to us; they are kept when the model is written again
    notes       what a user should know of how the file was read
    raises      CheckpointError for a weight, bias or scale of integers
    """

    path: Path
    dialect: str
    dtype: torch.dtype
    provenance: Provenance
    specs: Mapping[str, LayerSpec]
    rest: Mapping[str, TensorInfo]
    _read_layer: Callable[[str], Mapping[str, torch.Tensor]]
    _read_rest: Callable[[str], torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, info in self.rest.items():
            if name.rpartition(".")[2] in FLOATS and not info.dtype.is_floating_point:
                raise CheckpointError(
                    f"{self.path.name}: {name} has dtype {str(info.dtype).removeprefix('torch.')}, needed floating "
                    "point. The header was edited or the file is damaged: download or write it again"
                )

    def layer(self, name: str) -> Layer:
        """Read one layer. Raises CheckpointError if it is damaged, does not fit its spec, or holds NaN or Inf."""
        try:
            tensors = self._read_layer(name)
            layer = Layer(self.specs[name], tensors)
            check_values(tensors)
        except TensorFileError as error:
            raise CheckpointError(str(error)) from error
        except LayerError as error:
            raise CheckpointError(f"{self.path.name}: layer {name!r}: {error}") from error
        return layer

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor of `rest`. Raises CheckpointError if it is damaged, or holds NaN or Inf."""
        try:
            tensor = self._read_rest(name)
            check_values({name: tensor})
        except TensorFileError as error:
            raise CheckpointError(str(error)) from error
        except LayerError as error:
            raise CheckpointError(f"{self.path.name}: {error}") from error
        return tensor

    def check_compute(self, compute: str) -> None:
        """Raise CheckpointError if some layers cannot compute in this mode (see kernels/modes.py), naming what can."""
        if compute not in COMPUTES:
            raise CheckpointError(f"{self.path.name}: compute is {compute!r}, known are {', '.join(COMPUTES)}")
        for format in sorted({spec.format for spec in self.specs.values()}):
            known = computes_of(format)
            if compute not in known:
                raise CheckpointError(
                    f"{self.path.name}: compute is {compute!r}, but its {format} layers have {', '.join(known)}. "
                    "Choose one of these; auto takes the best one of the device"
                )

    def weight_infos(self) -> dict[str, TensorInfo]:
        """Every tensor as the 16-bit model has it: 4-bit layers appear as `name.weight` of shape (N, K)."""
        dense = {f"{name}.weight": TensorInfo((spec.n, spec.k), self.dtype) for name, spec in self.specs.items()}
        return {**self.rest, **dense}


def new_checkpoint(path: Path, specs: Collection[LayerSpec], rest: Collection[TensorInfo]) -> TensorWriter:
    """A file with room, in its header and on the disk, for such layers and other tensors; they come through `add`."""
    size = sum(spec.fmt.nbytes(spec.n, spec.k, spec.rank) for spec in specs) + sum(info.nbytes for info in rest)
    return TensorWriter(path, {}, _most_tensors(specs) + len(rest), size)


def header_room(specs: Collection[LayerSpec], rest: int) -> int:
    """Bytes that the header of such a file takes, with `rest` other tensors"""
    return METADATA_ROOM + ROOM_PER_EXTRA_TENSOR * (_most_tensors(specs) + rest)


def _most_tensors(specs: Collection[LayerSpec]) -> int:
    """All that a layer may have, its bias and its marker: layers that a dialect stores apart fit as well."""
    return sum(len(spec.fmt.parts(spec.n, spec.k, spec.rank)) + 2 for spec in specs)
