"""One run of the writer: what is written so far, and what every step of it needs to know."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .....kernels.formats import SIXTEEN_BIT
from .....kernels.layer import LayerError, LayerSpec
from ...checkpoint import Checkpoint
from ...tensor_file import TensorWriter
from .tables import Block, LinearRow, NameMap, Sizes, StoredName, split_name

Step = Callable[[str], None]
Place = tuple[Block, int | None, LinearRow]


@dataclass
class SaveRun:
    """One run of the writer.

    lite      Nunchaku Lite: Diffusers' names, signed activations, modulation as it is, ranks as they are
    shapes    stored layer -> logical [N, K], of padded layers
    skipped   words for quantization_config: parts of the model that are in 16 bit as a whole
    rank      of every layer with 4-bit activations: a model's class has one for all; 0: as they are
    consumed  ComfyUI's tensor names that are written
    rounded   names of tensors whose numbers changed because the file has one 16-bit dtype
    """

    checkpoint: Checkpoint
    writer: TensorWriter
    names: NameMap
    lite: bool
    sizes: Sizes
    step: Step
    shapes: dict[str, list[int]] = field(default_factory=dict)
    formats: dict[str, LayerSpec] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, bool] = field(default_factory=dict)
    rank: int = 0
    consumed: set[str] = field(default_factory=set)
    rounded: list[str] = field(default_factory=list)

    def take(self, name: str) -> torch.Tensor:
        self.consumed.add(name)
        return self.checkpoint.tensor(name)

    def take_bias(self, layer: str) -> torch.Tensor | None:
        return self.take(f"{layer}.bias") if f"{layer}.bias" in self.checkpoint.rest else None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, floats in the one 16-bit dtype of the file: the model's class takes no other"""
        dtype = self.checkpoint.dtype
        if tensor.dtype in SIXTEEN_BIT and tensor.dtype != dtype:
            wide, tensor = tensor, tensor.to(dtype)
            if not torch.equal(tensor.to(wide.dtype), wide):
                self.rounded.append(name)
        self.writer.add(name, tensor.contiguous())

    def hosts(self, place: Place) -> list[str]:
        block, number, linear = place
        return [block.host_name(number, host) for host in linear.host]


def places(run: SaveRun) -> Iterable[Place]:
    """Every linear that the model has, block after block."""
    every = [*run.checkpoint.specs, *(name.rpartition(".")[0] for name in run.checkpoint.rest)]
    for block in run.names.blocks:
        known = {host for linear in block.linears for host in linear.host}
        numbers = {split[0] for name in every if (split := split_name(block.host, name)) and split[1] in known}
        for number in sorted(numbers, key=lambda number: number or 0):
            for linear in block.linears:
                yield block, number, linear


def bind_sizes(run: SaveRun, found: Iterable[Place]) -> None:
    """Learn h and mlp from the linears that are one in both."""
    infos = run.checkpoint.weight_infos()
    for place in found:
        linear = place[2]
        if len(linear.host) == len(linear.stored) == 1:
            info = infos.get(f"{run.hosts(place)[0]}.weight")
            if info is not None and len(info.shape) == 2:
                run.sizes.bind(linear.stored[0].n, info.shape[0])
                run.sizes.bind(linear.stored[0].k, info.shape[1])


def shares(run: SaveRun, linear: LinearRow, parts: Iterable[StoredName], total: int) -> list[int]:
    """How `total` rows (or columns) of a joined linear divide among its parts; one size may follow from the others."""
    parts = list(parts)
    texts = [part.k if linear.join == "columns" else part.n for part in parts]
    sizes = [run.sizes.value(text) for text in texts]
    unknown = [i for i, size in enumerate(sizes) if size is None]
    if len(unknown) == 1:
        remaining = total - sum(size for size in sizes if size is not None)
        sizes[unknown[0]] = remaining
        run.sizes.bind(texts[unknown[0]], remaining)
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or sum(known) != total or min(known) <= 0:
        raise LayerError(f"{total} {linear.join} do not divide into {', '.join(part.name for part in parts)}: {sizes}")
    return known
