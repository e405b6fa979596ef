"""A 4-bit layer as one vector of bytes: what a host stores, moves and hands back for the forward pass."""

from dataclasses import dataclass, field, replace

import torch

from ..kernels import Choice, Lora, Prepared, choose
from ..kernels.dispatch import USUAL_ROWS
from ..kernels.layer import BlobView, Layer, LayerSpec, from_blob, to_blob

LowRank = tuple[torch.Tensor, torch.Tensor]
"""(lora_down (K, R), lora_up (N, R))"""


@dataclass(frozen=True)
class PackedLinear:
    """The description of a blob: everything about a layer but its bytes.

    compute  one of kernels.COMPUTES

        >>> from svdquant_pack.kernels import FORMATS
        >>> tensors = FORMATS["int4"].encode_weight(torch.eye(64), torch.float32) | {"smooth_factor": torch.ones(64)}
        >>> blob, packed = PackedLinear.pack(Layer(LayerSpec("int4", n=64, k=64), tensors))
        >>> blob.shape, packed.spec.where
        (torch.Size([2560]), 'int4 at N=64, K=64, rank 0')
        >>> packed.forward(torch.full((1, 64), 7.0), blob, bias=torch.ones(64), lora=None)[0, :3]
        tensor([8., 8., 8.])
    """

    spec: LayerSpec
    views: tuple[BlobView, ...]
    compute: str = "auto"
    _prepared: Prepared = field(init=False, repr=False, compare=False)
    _passing: "PackedLinear | None" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_prepared", Prepared(self.compute))
        passing = replace(self, compute="w4a8-jit") if self.compute == "w8a8" else None  # bit-identical, kernels/modes
        object.__setattr__(self, "_passing", passing)

    @classmethod
    def pack(cls, layer: Layer, compute: str = "auto") -> tuple[torch.Tensor, "PackedLinear"]:
        """(blob, description). Inverse: `layer`."""
        blob, views = to_blob(layer.tensors)
        return blob, cls(layer.spec, views, compute)

    def layer(self, blob: torch.Tensor) -> Layer:
        """The layer inside `blob`, without a copy."""
        return Layer.known(self.spec, from_blob(blob, self.views))

    def forward(
        self, x: torch.Tensor, blob: torch.Tensor | Layer, bias: torch.Tensor | None, lora: Lora | None
    ) -> torch.Tensor:
        """svdquant_linear of the layer in `blob`, which lies on the device of x, or of `self.layer(blob)`."""
        return self._prepared(x, blob if isinstance(blob, Layer) else self.layer(blob), bias, lora)

    def passing(self) -> "PackedLinear":
        """The same layer for bytes that lie where they do for one call alone: nothing made from them may be kept."""
        return self._passing or self

    def choice(self, device: torch.device, dtype: torch.dtype, rows: int = USUAL_ROWS) -> Choice:
        """Which backend runs this layer there, and why the others do not."""
        return choose(self.spec, device, dtype, self.compute, rows)
