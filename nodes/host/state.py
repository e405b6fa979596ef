"""What the pack keeps with a host's model: one object, its attribute `svdquant`, shared by all clones of a patcher."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...kernels.first_use import FirstUse
from ...quantize.files.checkpoint import Provenance
from ...quantize.lora.fit import LoraLimits
from ...quantize.lora.loras import LayerLoras
from ...quantize.lora.store import FactorStore
from .linear import SVDQuantLinear


@dataclass(frozen=True, eq=False)
class LoadSnapshot:
    """What a load has put in place: the patches as the host saw them, without those of 4-bit layers.

    patches  weight key -> patches of a 16-bit layer
    rest     everything else that makes the host load weights anew when it changes
    nbytes   of the LoRAs of 4-bit layers
    """

    patches: Mapping[str, list[Any]]
    rest: tuple[Any, ...]
    nbytes: int


@dataclass(eq=False)
class ModelState:
    """The 4-bit layers of a model, and what is loaded into them at the moment.

    layers    weight key -> 4-bit layer
    path      of the file
    store     factored terms of the LoRAs
    snapshot  of the last load; None while nothing is loaded
    unhooked  weight key -> what a layer had before a hook's LoRAs took its place
    provenance  of the file, as far as it still holds for the model that was built from it
    limits    for LoRAs that a save node puts into the weights; None where it is to be refused
    first_use  compiles what the layers need
    shapes_shown  whether the layers' weights read as tensors (N, K): from a call that announces training until a load
    """

    layers: Mapping[str, SVDQuantLinear]
    path: Path | None = None
    store: FactorStore = field(default_factory=FactorStore)
    snapshot: LoadSnapshot | None = None
    unhooked: dict[str, LayerLoras | None] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    limits: LoraLimits | None = field(default_factory=LoraLimits)
    shapes_shown: bool = False
    first_use: FirstUse | None = None

    @classmethod
    def of(cls, model: torch.nn.Module) -> "ModelState":
        layers = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, SVDQuantLinear) and module.packed is not None
        }
        return cls(layers)

    def show_shapes(self, shown: bool) -> None:
        if shown != self.shapes_shown:
            self.shapes_shown = shown
            for layer in self.layers.values():
                layer.show_shape(shown)
