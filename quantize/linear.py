"""A 4-bit layer as one vector of bytes: what a host stores, moves and hands back for the forward pass."""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch

from ..kernels import Choice, Lora, Prepared, choose
from ..kernels.bounded_json import read_object
from ..kernels.dispatch import USUAL_ROWS
from ..kernels.layer import BlobView, Layer, LayerSpec, from_blob, to_blob
from ..kernels.ops import register
from ..kernels.order import ORDERS

LowRank = tuple[torch.Tensor, torch.Tensor]
"""(lora_down (K, R), lora_up (N, R))"""


@dataclass(frozen=True)
class PackedLinear:
    """The description of a blob: everything about a layer but its bytes.

    compute  one of kernels.COMPUTES
    order    how the numbers lie in the blob, see kernels/order.py
    text     all of it as a string, see `read`

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
    order: str = ""
    text: str = field(init=False, repr=False, compare=False)
    _prepared: Prepared = field(init=False, repr=False, compare=False)
    _passing: "PackedLinear | None" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # here, and not when they are wanted: torch.compile reads what it finds
        views = [asdict(view) | {"dtype": str(view.dtype).removeprefix("torch.")} for view in self.views]
        known = {"spec": asdict(self.spec), "views": views, "compute": self.compute, "order": self.order}
        object.__setattr__(self, "text", json.dumps(known))
        object.__setattr__(self, "_prepared", Prepared(self.compute))
        # bit-identical, see kernels/modes
        passing = replace(self, compute="w4a8-jit") if self.compute == "w8a8" else None
        object.__setattr__(self, "_passing", passing)

    @classmethod
    def pack(cls, layer: Layer, compute: str = "auto") -> tuple[torch.Tensor, "PackedLinear"]:
        """(blob, description). Inverse: `layer`."""
        blob, views = to_blob(layer.tensors, layer.spec.fmt.by_column)
        return blob, cls(layer.spec, views, compute)

    def layer(self, blob: torch.Tensor) -> Layer:
        """The layer inside `blob` in natural order, without a copy where it lies in that."""
        return self.as_it_lies(blob).in_order("")

    def listed(self, blob: torch.Tensor) -> Layer:
        """`layer`, for whom mostly wants names, shapes and sizes: numbers are put in order when they are looked at."""
        tensors = from_blob(blob, self.views)
        return Layer.known(self.spec, ORDERS[self.order].restore_when_read(tensors) if self.order else tensors)

    def as_it_lies(self, blob: torch.Tensor, passing: bool = False) -> Layer:
        """The layer inside `blob` in the order of its bytes, without a copy: for calls, or for one if `passing`."""
        return Layer.known(self.spec, from_blob(blob, self.views), self.order, passing)

    def arrange(self, blob: torch.Tensor, order: str, device: torch.device) -> "PackedLinear":
        """The same layer, its numbers moved inside `blob` to another order, on `device`. Inverse: order self.order."""
        if order == self.order or (order and self.spec.n % ORDERS[order].rows):
            return self
        found, moving = self.as_it_lies(blob), [*ORDERS[order or self.order].moves]
        there = Layer.known(self.spec, {name: found[name].to(device) for name in moving}, self.order).in_order(order)
        for name in moving:
            found[name].copy_(there[name])
        return replace(self, order=there.order)

    def forward(
        self, x: torch.Tensor, blob: torch.Tensor | Layer, bias: torch.Tensor | None, lora: Lora | None
    ) -> torch.Tensor:
        """svdquant_linear of the layer in `blob`, which lies on the device of x, or of `self.as_it_lies(blob)`."""
        if isinstance(blob, Layer):
            return self._prepared(x, blob, bias, lora)
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return packed_linear(x, blob, bias, *(lora or (None, None, None)), self.text)
        return self._prepared(x, self.as_it_lies(blob, passing=True), bias, lora)

    def passing(self) -> "PackedLinear":
        """The same layer for bytes that lie where they do for one call alone: nothing made from them may be kept."""
        return self._passing or self

    def choice(self, device: torch.device, dtype: torch.dtype, rows: int = USUAL_ROWS) -> Choice:
        """Which backend runs this layer there, and why the others do not."""
        return choose(self.spec, device, dtype, self.compute, rows)


@cache
def read(text: str) -> PackedLinear:
    """Inverse of PackedLinear.text

    >>> from svdquant_pack.kernels import FORMATS
    >>> weight = FORMATS["awq_w4a16"].encode_weight(torch.randn(64, 128), torch.bfloat16)
    >>> _, packed = PackedLinear.pack(Layer(LayerSpec("awq_w4a16", 64, 128), weight))
    >>> read(packed.text) == packed
    True
    """
    found = read_object(text, "the description of a layer")
    spec = found["spec"] | {"act_unsigned": tuple(found["spec"]["act_unsigned"])}
    views = [
        BlobView(**view | {"dtype": getattr(torch, view["dtype"]), "shape": tuple(view["shape"])})
        for view in found["views"]
    ]
    return PackedLinear(LayerSpec(**spec), tuple(views), found["compute"], found["order"])


def _run(x: torch.Tensor, blob: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
    down, up, strength, text = rest
    lora = None if down is None else Lora(down, up, strength)
    return read(text).forward(x, blob, bias, lora)


def _fake(x: torch.Tensor, blob: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], read(rest[-1]).spec.n)


# torch.compile sees a layer as this one node: of the tensors in the bytes it would trace and guard every view
packed_linear = register(
    "packed_linear",
    "(Tensor x, Tensor blob, Tensor? bias, Tensor? lora_down, Tensor? lora_up, Tensor? lora_strength, str text) "
    "-> Tensor",
    _run,
    _fake,
)
