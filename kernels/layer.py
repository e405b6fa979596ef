"""The tensors of one 4-bit linear layer, and the one blob of bytes that holds them all.

Every reader ends here and every kernel starts here. Names are the pack's vocabulary:

    qweight        (N, K/2) int8         packed 4-bit weight of the residual, low nibble = even input channel
    wscales        (K/group, N)          scale per weight group
    wtscale        ()                    optional, where the format has one: a scale for the whole tensor
    wcscales       (N,)                  optional, where the format has one: a scale per output channel
    wzeros         (K/group, N)          where the format has zero points
    smooth_factor  (K,)                  the activation is divided by it
    proj_down      (K, R)                low-rank branch, sees the unsmoothed activation
    proj_up        (N, R)
    act_mean       (K,)                  optional: taken off the activation before it is rounded to 4 bit
    out_mean       (N,) float32          with act_mean: decode(qweight) @ (act_mean / smooth_factor), added to y again

    y = Q((x - act_mean) / smooth_factor) @ decode(qweight).T + out_mean + (x @ proj_down) @ proj_up.T + bias

A mode that rounds to more than 4 bit ignores both: without them the layer is right as well, with a little more error.
The bias is not among them: a host wants to see it as an ordinary parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from operator import is_
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, overload

import torch

from .formats import FORMATS, GELU_SHIFT, STOCK_RULE, Format
from .order import ORDERS
from .packing import by_column

MEANS = ("act_mean", "out_mean")
RANK_TILE = 16  # columns of the low-rank branch that one tensor-core instruction multiplies; ranks are multiples of it
BLOB_ALIGNMENT = 256  # bytes; every view is aligned for any dtype and for vector loads


class LayerError(ValueError):
    """A layer's tensors do not fit together."""


@dataclass(frozen=True)
class LayerSpec:
    """What is known of a layer without its tensors. One that contradicts itself cannot be made.

    act_unsigned  half-open range of input channels whose activations are shifted by GELU_SHIFT and use unsigned codes;
                  (0, 0) for none. The stored bias then already contains -GELU_SHIFT * sum(dequantized weight / smooth)
    act_rule      how the layer's maker expects activation scales to be chosen, one of `fmt.act_rules`. A backend that
                  has only the stock rule, absmax, may use that: the layer stays right, with a little more error
    act_bits      4, or 8 for a layer whose activation loses too much in 4 bit: compute=auto then keeps 8
    raises        LayerError for an unknown format, and for a number that the format does not allow

        >>> spec = LayerSpec("int4", n=96, k=128, rank=16)
        >>> spec.where, spec.bytes_16bit()
        ('int4 at N=96, K=128, rank 16', 24576)
        >>> LayerSpec("int4", n=96, k=100)
        Traceback (most recent call last):
        ...
        svdquant_pack.kernels.layer.LayerError: K=100 is not a multiple of the int4 group of 64 input channels
    """

    format: str
    n: int
    k: int
    rank: int = 0
    act_unsigned: tuple[int, int] = (0, 0)
    act_rule: str = STOCK_RULE
    act_bits: int = 4

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise LayerError(f"format is {self.format!r}, known are {', '.join(FORMATS)}")
        fmt = self.fmt
        if self.n < 0 or self.k < 0 or self.rank < 0:
            raise LayerError(f"N={self.n}, K={self.k}, rank {self.rank}: needed numbers that are not negative")
        if self.k % fmt.group_size or self.k % 2:
            raise LayerError(
                f"K={self.k} is not a multiple of the {self.format} group of {fmt.group_size} input channels"
            )
        if self.rank and not fmt.low_rank:
            raise LayerError(f"rank is {self.rank}: {self.format} has no low-rank branch, needed 0")
        start, stop = self.act_unsigned
        if not 0 <= start <= stop <= self.k or start % fmt.group_size or stop % fmt.group_size:
            raise LayerError(
                f"unsigned channels {start}:{stop} must be whole groups of {fmt.group_size} within K={self.k}"
            )
        if start != stop and not fmt.unsigned_act:
            raise LayerError(f"unsigned channels {start}:{stop} are not defined for {self.format}")
        if self.act_rule not in fmt.act_rules:
            raise LayerError(
                f"activation rule {self.act_rule!r} is unknown to {self.format}, known are {fmt.act_rules}"
            )
        if self.act_bits not in (4, 8) or (self.act_bits == 8 and not fmt.low_rank):
            has = "4 or 8" if fmt.low_rank else "16"
            raise LayerError(f"activations in {self.act_bits} bit: {self.format} has {has}")

    @property
    def fmt(self) -> Format:
        return FORMATS[self.format]

    @cached_property
    def kind(self) -> tuple[str, bool, int]:
        """(format, partly_unsigned, act_bits): what a choice of kernels depends on"""
        return self.format, self.partly_unsigned, self.act_bits

    @property
    def partly_unsigned(self) -> bool:
        """Whether some, but not all, input channels have unsigned codes."""
        return self.act_unsigned not in ((0, 0), (0, self.k))

    @property
    def where(self) -> str:
        return f"{self.format} at N={self.n}, K={self.k}, rank {self.rank}"

    def bytes_16bit(self) -> int:
        """Size of the same weight in 16 bit."""
        return 2 * self.n * self.k

    def check(self, tensors: Mapping[str, "ShapeAndDtype"]) -> None:
        """Raise LayerError unless `tensors` are exactly what the format asks of such a layer.

        They may be anything with a shape and a dtype: of a file's header, for one. Values are not looked at.
        """
        parts = self.fmt.parts(self.n, self.k, self.rank)
        for name, part in parts.items():
            if name not in tensors:
                if part.optional:
                    continue
                raise LayerError(f"{name} is missing; {self.where} needs it")
            found = tensors[name]
            if tuple(found.shape) != part.shape:
                raise LayerError(f"{name} has shape {tuple(found.shape)}, {self.where} needs {part.shape}")
            if found.dtype not in part.dtypes:
                known = " or ".join(str(dtype).removeprefix("torch.") for dtype in part.dtypes)
                raise LayerError(f"{name} has dtype {str(found.dtype).removeprefix('torch.')}, needed {known}")
        for name in tensors:
            if name not in parts:
                raise LayerError(f"{name} is not a tensor of a {self.format} layer of rank {self.rank}")
        if len([name for name in MEANS if name in tensors]) == 1:
            raise LayerError("act_mean and out_mean belong together, this layer has one of them")


class ShapeAndDtype(Protocol):
    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Made(NamedTuple):
    """What Layer.once keeps: a value, and the tensors it was made from as they were then."""

    sources: Sequence[torch.Tensor]
    versions: list[tuple[int, int]]
    value: Any


class Lora(NamedTuple):
    """The user's LoRA, more columns beside the low-rank branch: (x @ down * strength) @ up.T

    down      (K, R'), up (N, R')
    strength  (ceil(R' / RANK_TILE),) float32, a factor for each RANK_TILE columns, or None
    """

    down: torch.Tensor
    up: torch.Tensor
    strength: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """A LayerSpec with its tensors: names, shapes and dtypes as the format declares them, on one device.

    order   how the numbers of `tensors` lie in memory, a name in order.ORDERS, or "": natural
    raises  LayerError for anything else, when it is made: kernels look at no shape again

        >>> weight = torch.eye(64)
        >>> tensors = FORMATS["int4"].encode_weight(weight, torch.bfloat16) | {"smooth_factor": torch.full((64,), 2.0)}
        >>> layer = Layer(LayerSpec("int4", n=64, k=64), tensors)
        >>> layer["qweight"].shape, layer.nbytes()
        (torch.Size([64, 32]), 2432)
        >>> torch.allclose(layer.dense_weight(), weight / 2, rtol=0.01)
        True
    """

    spec: LayerSpec
    tensors: Mapping[str, torch.Tensor]
    order: str = ""
    _made: dict[str, "Made"] | None = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.spec.check(self.tensors)
        devices = {tensor.device: name for name, tensor in self.tensors.items()}
        if len(devices) > 1:
            places = " and ".join(f"{name} on {device}" for device, name in devices.items())
            raise LayerError(f"{places}: a layer lies on one device, move one of them")

    @classmethod
    def known(
        cls, spec: LayerSpec, tensors: Mapping[str, torch.Tensor], order: str = "", passing: bool = False
    ) -> "Layer":
        """The same without looking: for tensors that a checked layer was taken apart into, once per forward call.

        passing  for one call alone: `once` keeps nothing for a second
        """
        layer = object.__new__(cls)
        layer.__dict__.update(spec=spec, tensors=tensors, order=order, _made=None if passing else {})
        return layer

    def in_order(self, order: str) -> "Layer":
        """The same layer in another order; itself where it is in that one, or where its N does not fit the order."""
        if self.order == order or (order and self.spec.n % ORDERS[order].rows):
            return self
        tensors = ORDERS[self.order].restore(self.tensors) if self.order else self.tensors
        return Layer.known(self.spec, ORDERS[order].arrange(tensors) if order else dict(tensors), order)

    def to(self, device: torch.device | str) -> "Layer":
        """The layer on another device."""
        return Layer.known(self.spec, {name: tensor.to(device) for name, tensor in self.tensors.items()}, self.order)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def once(self, name: str, sources: Sequence[torch.Tensor], make: Callable[[], Any]) -> Any:
        """make(), or what it gave for the same sources, as long as this object lives: for small tensors made from them

        >>> layer = Layer.known(LayerSpec("int4", n=64, k=64), {})
        >>> source = torch.ones(2)
        >>> [layer.once("sum", [source], source.sum).item() for _ in "12"], source.add_(1).dim()
        ([2.0, 2.0], 1)
        >>> layer.once("sum", [source], source.sum)
        tensor(4.)
        """
        if self._made is None:
            return make()
        versions = [(source.data_ptr(), version_of(source)) for source in sources]
        made = self._made.get(name)
        if made is not None and made.versions == versions and all(map(is_, made.sources, sources)):
            return made.value
        value = make()
        # what is made while a graph is captured holds no numbers before the graph runs
        if not (sources[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            self._made[name] = Made(sources, versions, value)
        return value

    def contiguous(self) -> "Layer":
        """The same with every tensor contiguous, as kernels need them, but for those that may lie by column"""
        free = self.spec.fmt.by_column
        if all(tensor.is_contiguous() or name in free for name, tensor in self.tensors.items()):
            return self
        tensors = {name: part if name in free else part.contiguous() for name, part in self.tensors.items()}
        return Layer.known(self.spec, tensors, self.order)

    def centred_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """b + out_mean, what 4-bit activations have to be completed with; b itself where nothing is taken off"""
        out_mean = self.tensors.get("out_mean")
        if out_mean is None or bias is None:
            return bias if out_mean is None else out_mean
        if bias.is_inference():  # torch does not count what is written to it
            return bias + out_mean
        return self.once("centred_bias", (bias, out_mean), lambda: bias + out_mean)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def decode_weight(self) -> torch.Tensor:
        """(N, K) float32, the 4-bit part in the smoothed domain: without low-rank branch, not divided by smoothing."""
        return self.spec.fmt.decode_weight(self.in_order("").tensors)

    def dense_weight(self) -> torch.Tensor:
        """W = decode(qweight) / smooth_factor + proj_up @ proj_down.T, (N, K) float32: the layer as one matrix."""
        weight = self.decode_weight()
        if "smooth_factor" in self.tensors:
            weight = weight / self["smooth_factor"].float()
        if self.spec.rank:
            weight = weight + self["proj_up"].float() @ self["proj_down"].float().T
        return weight

    @overload
    def unshifted_bias(self, bias: torch.Tensor) -> torch.Tensor: ...

    @overload
    def unshifted_bias(self, bias: None) -> torch.Tensor | None: ...

    def unshifted_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """b = stored bias + GELU_SHIFT * sum over unsigned channels of decode(qweight) / smooth_factor, float32."""
        start, stop = self.spec.act_unsigned
        if start == stop:
            return bias
        shift = shifted_bias_term(self.decode_weight(), self["smooth_factor"], self.spec.act_unsigned)
        return shift if bias is None else bias.float() + shift


def version_of(tensor: torch.Tensor) -> int:
    """How often it was written to, as far as torch counts: not for tensors that were made in inference mode"""
    return 0 if tensor.is_inference() else tensor._version


def shifted_bias_term(weight: torch.Tensor, smooth_factor: torch.Tensor, act_unsigned: tuple[int, int]) -> torch.Tensor:
    """GELU_SHIFT * sum_k weight[n, k] / smooth_factor[k] over the unsigned channels, (N,) float32

    What the shift of the activation adds to the output, hence what the stored bias has to take off.
    """
    start, stop = act_unsigned
    channels = weight[:, start:stop].double() / smooth_factor[start:stop].double()
    return (GELU_SHIFT * channels.sum(1)).float()


def mean_term(weight: torch.Tensor, smooth_factor: torch.Tensor, act_mean: torch.Tensor) -> torch.Tensor:
    """out_mean = weight @ (act_mean / smooth_factor), (N,) float32, of a decoded weight (N, K)"""
    return (weight.double() @ (act_mean.double() / smooth_factor.double())).float()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of floats, of any width, holds neither NaN nor Inf; without a mask of its size."""
    values = tensor.float() if tensor.itemsize == 1 else tensor
    # NaN passes through aminmax; a GPU is waited for once
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise LayerError if a float tensor holds NaN or Inf, or smooth_factor (a divisor) a zero."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise LayerError(f"{name} holds NaN or Inf; the file is damaged or was written by a failed run")
    if "smooth_factor" in tensors and (tensors["smooth_factor"] == 0).any():
        raise LayerError("smooth_factor holds a zero, the activation is divided by it")


@dataclass(frozen=True)
class BlobView:
    """Where one tensor lies in a blob; with `column`, column by column, so many elements from one to the next."""

    name: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    column: int = 0

    @cached_property
    def stride(self) -> tuple[int, ...]:
        if self.column:
            return 1, self.column
        return tuple(prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))


def to_blob(
    tensors: Mapping[str, torch.Tensor], columns: Mapping[str, int] = MappingProxyType({})
) -> tuple[torch.Tensor, tuple[BlobView, ...]]:
    """blob[view.offset : view.offset + view.nbytes] = the bytes of each tensor; offsets are multiples of 256

    columns  as Format.by_column; every other tensor is contiguous

    Inverse: `from_blob`. One uint8 vector per layer lets a host that knows nothing of 4-bit layers move, count, pin and
    stream it as one weight.

        >>> blob, views = to_blob({"qweight": torch.arange(3, dtype=torch.int8), "wscales": torch.ones(2)})
        >>> blob.shape, blob.dtype
        (torch.Size([512]), torch.uint8)
        >>> views[1]
        BlobView(name='wscales', offset=256, nbytes=8, dtype=torch.float32, shape=(2,), column=0)
    """
    views, stored, end = [], [], 0
    for name, tensor in tensors.items():
        kept = by_column(tensor.detach(), columns[name]) if name in columns else tensor.detach().contiguous()
        column = kept.shape[1] if name in columns else 0
        views.append(BlobView(name, end, kept.nbytes, kept.dtype, tuple(tensor.shape), column))
        stored.append(kept)
        end += kept.nbytes + -kept.nbytes % BLOB_ALIGNMENT
    blob = torch.zeros(end, dtype=torch.uint8)
    for view, kept in zip(views, stored, strict=True):
        blob[view.offset : view.offset + view.nbytes] = kept.reshape(-1).view(torch.uint8)
    return blob, tuple(views)


def from_blob(blob: torch.Tensor, views: tuple[BlobView, ...]) -> dict[str, torch.Tensor]:
    """{view.name: blob[view.offset : view.offset + view.nbytes]}, each in its dtype and shape

    Inverse of `to_blob`. Without a copy, on the blob's device.

        >>> blob, views = to_blob({"qweight": torch.arange(3, dtype=torch.int8), "wscales": torch.ones(2)})
        >>> from_blob(blob, views)["wscales"]
        tensor([1., 1.])
    """
    base, typed, found = blob.storage_offset(), {}, {}
    for view in views:
        dtype = view.dtype
        if dtype not in typed:
            typed[dtype] = blob.view(dtype)
        # one step where slice and view are three
        found[view.name] = typed[dtype].as_strided(view.shape, view.stride, (base + view.offset) // dtype.itemsize)
    return found
