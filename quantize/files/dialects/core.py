"""Checkpoints for ComfyUI's own loader, as far as it is known what that will take: a writer. It reads them as native.

ComfyUI pull request 13580 gives the host layers "svdquant_w4a4" and "awq_w4a16" under the native dialect's names (see
native.py), and no others. What a native file may hold beside them becomes, with a note for each layer:

    nvfp4                   int4 with the same branch: the weight is rounded again, and the note says by how much it
                            changed, ||W' - W|| / ||W|| of the weight with its branch
    act_unsigned_range      signed activations; the shift leaves the bias
    act_mean, 8-bit activations   nothing: such a layer runs with a little more error
    rank 0                  a branch of zeros, which the host's kernels want

There is nothing to read here: what is written is a native file that holds less.
"""

from collections.abc import Callable

import torch

from ....kernels.layer import Layer, LayerSpec
from ..checkpoint import Checkpoint, CheckpointError
from ..spelling import formats_of
from ..tensor_file import TensorFile, TensorWriter
from . import Dialect, native
from .kitchen import NAME as KITCHEN
from .kitchen import save_layers, with_branch

NAME = "core"


def speaks(file: TensorFile) -> bool:
    """No: a file for the host's own loader is a native one."""
    return False


def known_layer(name: str, layer: Layer, notes: list[str]) -> Layer:
    """The layer in a format that the host has; `notes` gets a line for what that costs. Raises CheckpointError."""
    known = formats_of(KITCHEN).values()
    if layer.spec.fmt in known:
        return layer
    fmt = next(fmt for fmt in known if fmt.low_rank)
    if layer.spec.k % fmt.group_size:
        raise CheckpointError(
            f"layer {name!r} is {layer.spec.format} with K={layer.spec.k}, and ComfyUI has {fmt.name} alone, which "
            f"wants a multiple of {fmt.group_size}. Quantize the 16-bit model with that layer left in 16 bit"
        )
    old, spec = layer.spec, LayerSpec(fmt.name, layer.spec.n, layer.spec.k, layer.spec.rank)
    kept = {part: tensor for part, tensor in layer.tensors.items() if part in spec.fmt.part_names}
    made = Layer(spec, kept | fmt.encode_weight(layer.decode_weight(), layer["smooth_factor"].dtype))
    exact = layer.dense_weight()
    loss = ((made.dense_weight() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
    notes.append(f"{name}: ComfyUI has no {old.format}; it became {fmt.name}, which moved its weight by {loss:.1%}")
    return made


def save(checkpoint: Checkpoint, writer: TensorWriter, as_is: bool, step: Callable[[str], None]) -> list[str]:
    """Write a checkpoint of the host's own two formats. Raises CheckpointError for what cannot become one."""

    def encode(name: str, layer: Layer, notes: list[str]) -> dict[str, torch.Tensor]:
        return native.encode_layer(name, with_branch(known_layer(name, layer, notes)))

    return save_layers(checkpoint, writer, step, encode)


DIALECT = Dialect(NAME, speaks, native.open_file, save=save)
