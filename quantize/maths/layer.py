"""One layer: what it is before (Dense), how it is made (Making), what comes out (FittedLayer), and the error between.

The vector that divides the activation is `smooth` in formulas and code, `smooth_factor` among the tensors of a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...kernels.layer import Layer, LayerError, LayerSpec, is_finite, mean_term
from ..recipe import Recipe
from .inputs import LayerInput, shift_of
from .rounding import WeightScales


@dataclass(frozen=True)
class Dense:
    """A layer before it is 4-bit, y = x @ weight.T + bias, and the form that it will get.

    weight  (N, K), any float dtype
    bias    (N,) or None
    raises  LayerError for shapes that do not fit the spec, for integers, and for NaN or Inf
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    spec: LayerSpec

    def __post_init__(self) -> None:
        wanted = {"weight": (self.spec.n, self.spec.k), "bias": (self.spec.n,)}
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is None and name == "bias":
                continue
            if tuple(tensor.shape) != shape:
                raise LayerError(f"{name} has shape {tuple(tensor.shape)}, {self.spec.where} is made of {shape}")
            if not tensor.is_floating_point():
                raise LayerError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, needed a float")
            if not is_finite(tensor):
                raise LayerError(f"{name} holds NaN or Inf: repair or replace the source model")

    def floats(self, device: torch.device | str) -> "Dense":
        """The same in float32 on a device, with a bias of zeros where unsigned activations need one for their shift."""
        weight = self.weight.to(device).float()
        if self.bias is not None:
            return Dense(weight, self.bias.to(weight), self.spec)
        return Dense(weight, weight.new_zeros(self.spec.n) if self.spec.act_unsigned != (0, 0) else None, self.spec)

    @classmethod
    def stacked(cls, layers: Sequence["Dense"]) -> "Dense":
        """Layers of one input as one, outputs side by side; all or none have a bias, and all have one kind of spec."""
        biases = [dense.bias for dense in layers if dense.bias is not None]
        spec = replace(layers[0].spec, n=sum(dense.spec.n for dense in layers))
        return cls(torch.cat([dense.weight for dense in layers]), torch.cat(biases) if biases else None, spec)

    def with_8bit_activations(self) -> "Dense":
        return replace(self, spec=replace(self.spec, act_bits=8))


@dataclass(frozen=True)
class Making:
    """How layers are made.

    dtype   of the stored 16-bit tensors
    device  where to compute
    """

    recipe: Recipe
    dtype: torch.dtype
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class FittedLayer:
    """A finished layer as matrices: y = round((x + shift) / smooth) @ rounded.T + (x @ proj_down) @ proj_up.T + bias

    rounded lies on the grid of `scales`; smooth, proj_down, proj_up and act_mean hold 16-bit values in float32.
    With act_mean, round(z) is round(z - centre) + centre.
    """

    smooth: torch.Tensor
    rounded: torch.Tensor
    scales: WeightScales
    proj_down: torch.Tensor
    proj_up: torch.Tensor
    bias: torch.Tensor | None
    act_mean: torch.Tensor | None = None

    @property
    def centre(self) -> torch.Tensor | None:
        """act_mean after smoothing"""
        return None if self.act_mean is None else self.act_mean / self.smooth

    def split(self, sizes: Sequence[int]) -> list["FittedLayer"]:
        """One layer per share of the output channels: `Dense.stacked` undone. They share all that their input has."""
        found, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            bias = None if self.bias is None else self.bias[rows]
            scales, up = self.scales.rows(rows), self.proj_up[rows]
            found.append(replace(self, rounded=self.rounded[rows], scales=scales, proj_up=up, bias=bias))
            start += size
        return found

    def layer(self, spec: LayerSpec, dtype: torch.dtype) -> Layer:
        """The stored layer; zero columns fill a smaller branch up to `spec.rank`."""
        tensors = {**self.scales.encode(self.rounded), "smooth_factor": self.smooth.to(dtype)}
        if spec.rank:
            more = (0, spec.rank - self.proj_down.shape[1])
            tensors["proj_down"] = torch.nn.functional.pad(self.proj_down, more).to(dtype)
            tensors["proj_up"] = torch.nn.functional.pad(self.proj_up, more).to(dtype)
        if self.act_mean is not None:
            tensors["act_mean"] = self.act_mean.to(dtype)
            tensors["out_mean"] = mean_term(self.rounded, self.smooth, self.act_mean)
        return Layer(spec, tensors)


@dataclass(frozen=True)
class Errors:
    """Relative output errors on some tokens, each ||difference|| / ||x @ W.T||.

    total       of the layer as the kernels run it
    activation  of rounding the activation alone: (zq - z) @ rounded.T
    weight      of what remains with exact activations
    by_bucket   total error of the tokens of each step bucket, None where a bucket has no token
    """

    total: float
    activation: float
    weight: float
    by_bucket: tuple[float | None, ...] = ()


def output_errors(
    fit: FittedLayer, dense: Dense, tokens: torch.Tensor, buckets: torch.Tensor | None = None, bucket_count: int = 0
) -> Errors:
    """The errors of `fit` against x @ W.T + bias on tokens (M, K) that it was not fitted to

    buckets  (M,) the step bucket of each token, where errors by bucket are wanted
    """
    inputs, first = LayerInput(tokens, fit.smooth, dense.spec, fit.centre), 0
    sums = torch.zeros(4, len(tokens), dtype=torch.float64)  # total, activation, weight, exact
    shift = shift_of(dense.spec, dense.weight.device) / fit.smooth
    offset = 0 if dense.bias is None or fit.bias is None else fit.bias - dense.bias
    for z in inputs.chunks(at_once=512):
        raw = (z - shift) * fit.smooth
        exact = raw @ dense.weight.T
        with_z = z @ fit.rounded.T
        with_zq = inputs.rounded(z) @ fit.rounded.T
        common = (raw @ fit.proj_down) @ fit.proj_up.T + offset - exact
        parts = (with_zq + common, with_zq - with_z, with_z + common, exact)
        for row, part in enumerate(parts):
            sums[row, first : first + len(z)] = part.square().sum(1).double().cpu()
        first += len(z)
    total, activation, of_weight, power = sums.sum(1).tolist()
    power = power or 1e-300  # a layer that only ever gives zeros, and is right, has no error
    by_bucket = []
    for bucket in range(bucket_count):
        inside = sums[:, buckets == bucket]
        by_bucket.append((inside[0].sum() / inside[3].sum()).sqrt().item() if inside[3].sum() > 0 else None)
    return Errors((total / power) ** 0.5, (activation / power) ** 0.5, (of_weight / power) ** 0.5, tuple(by_bucket))
