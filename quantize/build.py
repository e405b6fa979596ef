"""Make a 4-bit model: one layer, and a whole model layer after layer."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.layer import Layer, LayerSpec, shifted_bias_term
from . import lowrank, smooth
from .checkpoint import Provenance
from .dialects import native
from .families import FAMILIES, Family, detect
from .recipe import Recipe
from .source import Source
from .tensor_file import TensorInfo, TensorWriter

Progress = Callable[[int, int, str], None]
"""progress(done, total, layer): called before each layer; raise from it to stop, nothing is then left on disk"""


class QuantizeError(ValueError):
    """A model cannot be quantized. The message names the layer."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer with its bias (None if it has none) and its error ||W - dense(layer)|| / ||W||."""

    layer: Layer
    bias: torch.Tensor | None
    error: float


def quantize_layer(
    weight: torch.Tensor, bias: torch.Tensor | None, spec: LayerSpec, recipe: Recipe, dtype: torch.dtype
) -> QuantizedLayer:
    """W * smooth = up @ down.T + decode(qweight): smooth, split, round; the rounding sees the 16-bit factors

    weight (N, K), bias (N,) or None; `dtype` is that of the stored 16-bit tensors.
    """
    weight = weight.float()
    if spec.fmt.low_rank:
        tensors = _smooth_and_split(weight, spec, recipe, dtype)
    else:
        tensors = spec.fmt.encode_weight(weight, dtype)
    layer = Layer(spec, tensors)
    if spec.act_unsigned != (0, 0):
        shift = shifted_bias_term(layer.decode_weight(), layer["smooth_factor"], spec.act_unsigned)
        bias = (-shift if bias is None else bias.float() - shift).to(dtype)
    scale = weight.norm()
    error = ((weight - layer.dense_weight()).norm() / torch.where(scale == 0, 1, scale)).item()
    return QuantizedLayer(layer, bias, error)


def _smooth_and_split(
    weight: torch.Tensor, spec: LayerSpec, recipe: Recipe, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    fmt = spec.fmt
    factor = smooth.from_weight_spans(weight, recipe.smooth_power).to(dtype)
    smoothed = weight * factor.float()
    if not spec.rank:
        return {**fmt.encode_weight(smoothed, dtype), "smooth_factor": factor}
    best, rounded = None, torch.zeros_like(smoothed)
    for _ in range(max(1, recipe.alternations)):
        down, up = lowrank.split(smoothed - rounded, spec.rank, recipe.seed)
        # the stored branch sees the unsmoothed activation, and rounding to 16 bit is part of what it is
        down16, up16 = (down / factor.float()[:, None]).to(dtype), up.to(dtype)
        residual = (weight - up16.float() @ down16.float().T) * factor.float()
        encoded = fmt.encode_weight(residual, dtype)
        rounded = fmt.decode_weight(encoded)
        error = (residual - rounded).norm().item()
        if best is not None and error >= best[0]:
            break
        best = error, {**encoded, "smooth_factor": factor, "proj_down": down16, "proj_up": up16}
    return best[1]


def plan_layers(infos: Mapping[str, TensorInfo], family: Family, recipe: Recipe) -> dict[str, LayerSpec]:
    """Which linears become 4-bit, by the family's table. Layers whose K does not fit the group stay in 16 bit."""
    specs = {}
    for key, info in infos.items():
        layer = key.removesuffix(".weight")
        if layer == key or len(info.shape) != 2:
            continue
        n, k = info.shape
        rule = family.rule(layer, n, k)
        if rule is None or (rule.kind == "w4a16" and recipe.modulation == "16bit"):
            continue
        format = "awq_w4a16" if rule.kind == "w4a16" else recipe.format
        spec = LayerSpec(format, n, k)
        if k % spec.fmt.group_size:
            continue
        if spec.fmt.low_rank:
            act_unsigned = rule.act_unsigned if format == "int4" else (0, 0)
            spec = LayerSpec(format, n, k, recipe.rank, act_unsigned)
        specs[layer] = spec
    return specs


@dataclass(frozen=True)
class QuantizeReport:
    """What a run did: family, error per layer, bytes of the 4-bit layers and of the same weights in 16 bit."""

    path: Path
    family: str
    errors: Mapping[str, float]
    bytes_4bit: int
    bytes_16bit: int


def quantize_model(
    source: Source, path: str | Path, recipe: Recipe, progress: Progress | None = None, device: str = "cpu"
) -> QuantizeReport:
    """Write a native checkpoint of `source` to `path`, one layer in memory at a time.

    raises  QuantizeError for a model without a layer to quantize, with NaN or Inf, or already quantized; whatever
            `progress` raises. In every such case `path` is as it was before.
    """
    family = detect(source.infos) if source.family is None else FAMILIES[source.family]
    specs = plan_layers(source.infos, family, recipe)
    if not specs:
        raise QuantizeError(f"{source.name}: no linear layer of family {family.name} can become 4-bit")
    dtype = _stored_dtype(source.infos[f"{layer}.weight"].dtype for layer in specs)
    biases = {f"{layer}.bias" for layer in specs}
    plan = {key: info for key, info in source.infos.items() if key.removesuffix(".weight") not in specs}
    for layer, spec in specs.items():
        plan |= native.plan_layer(layer, spec, dtype)
        if f"{layer}.bias" in plan or spec.act_unsigned != (0, 0):
            plan[f"{layer}.bias"] = TensorInfo((spec.n,), dtype)
    digest, errors, size = hashlib.sha256(), {}, 0
    with TensorWriter(path, plan) as writer:
        for done, (layer, spec) in enumerate(specs.items()):
            if progress is not None:
                progress(done, len(specs), layer)
            weight = _read(source, f"{layer}.weight", digest)
            bias = _read(source, f"{layer}.bias", digest) if f"{layer}.bias" in source.infos else None
            made = quantize_layer(weight.to(device), None if bias is None else bias.to(device), spec, recipe, dtype)
            for key, tensor in native.encode_layer(layer, made.layer).items():
                writer.write(key, tensor)
            if made.bias is not None:
                writer.write(f"{layer}.bias", made.bias.to(dtype))
            errors[layer] = made.error
            size += made.layer.nbytes()
        for key in plan:
            if key in source.infos and key not in biases and key.removesuffix(".weight") not in specs:
                writer.write(key, _read(source, key, digest))
        provenance = Provenance(family.name, source.unet_config, source.pinned, recipe.as_dict(), digest.hexdigest())
        writer.metadata |= native.metadata_of(provenance, specs)
    if progress is not None:
        progress(len(specs), len(specs), "")
    return QuantizeReport(Path(path), family.name, errors, size, sum(spec.bytes_16bit() for spec in specs.values()))


def _stored_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """fp16 stays fp16; everything else is stored as bf16, whose range no weight overflows."""
    return torch.float16 if set(dtypes) == {torch.float16} else torch.bfloat16


def _read(source: Source, key: str, digest: "hashlib._Hash") -> torch.Tensor:
    tensor = source.tensor(key)
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(memoryview(raw.numpy()))
    if tensor.is_floating_point() and not (tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all():
        raise QuantizeError(f"{source.name}: {key} holds NaN or Inf; repair or replace the source model")
    return tensor
