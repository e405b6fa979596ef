"""A 4-bit layer as one vector of bytes: what a host stores, moves and hands back for the forward pass."""

from dataclasses import dataclass

import torch

from ..kernels import Choice, choose, svdquant_linear
from ..kernels.layer import BlobView, Layer, LayerSpec, from_blob, to_blob

LowRank = tuple[torch.Tensor, torch.Tensor]
"""(lora_down (K, R), lora_up (N, R))"""


@dataclass(frozen=True)
class PackedLinear:
    """The description of a blob: everything about a layer but its bytes.

    compute  auto, w4a4 or w16, see kernels.svdquant_linear
    """

    spec: LayerSpec
    views: tuple[BlobView, ...]
    compute: str = "auto"

    @classmethod
    def pack(cls, layer: Layer, compute: str = "auto") -> tuple[torch.Tensor, "PackedLinear"]:
        """(blob, description). Inverse: `layer`."""
        blob, views = to_blob(layer.tensors)
        return blob, cls(layer.spec, views, compute)

    def layer(self, blob: torch.Tensor) -> Layer:
        """The layer inside `blob`, without a copy."""
        return Layer(self.spec, from_blob(blob, self.views))

    def forward(
        self, x: torch.Tensor, blob: torch.Tensor, bias: torch.Tensor | None, lora: LowRank | None
    ) -> torch.Tensor:
        """svdquant_linear of the layer in `blob`, which lies on the device of x."""
        return svdquant_linear(x, self.layer(blob), bias, lora, self.compute)

    def choice(self, device: torch.device, dtype: torch.dtype) -> Choice:
        """Which backend runs this layer there, and why the others do not."""
        return choose(self.spec.format, device, dtype, self.compute)
