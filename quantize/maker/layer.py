"""Make the 4-bit layers that read one activation: without data, by our recipes, or by the reference recipe."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...kernels.layer import Layer, LayerSpec, shifted_bias_term
from ..calibration.tokens import BUCKETS, Entry
from ..maths import lowrank, smooth
from ..maths.moments import smoothed_chunks
from ..maths.refine import NOISE_TOKENS, Errors, Fit, corrected_bias, mean_of, output_errors, refine, to_16bit
from ..maths.rounding import absmax_scales, searched_scales
from ..maths.svdquant_reference import svdquant
from ..recipe import Recipe

SMOOTHING_TOKENS = 4096  # of the kept ones, for spans and the noise model
PLAIN = "plain"  # SVDQuant without search, which every layer has to beat
FEWEST_TOKENS = 0.25  # per input channel; with fewer, fitting to them does more harm than good


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer with its bias (None if it has none) and its error ||W - dense(layer)|| / ||W||.

    record  for the report: output errors on held-out tokens, what was chosen and why
    """

    layer: Layer
    bias: torch.Tensor | None
    error: float
    record: dict[str, Any] = field(default_factory=dict)


def quantize_layer(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    spec: LayerSpec,
    recipe: Recipe,
    dtype: torch.dtype,
    spans: torch.Tensor | None = None,
) -> QuantizedLayer:
    """W * smooth = up @ down.T + decode(qweight) without data: smooth, split, round, a few times; the best is kept

    weight (N, K), bias (N,) or None; `dtype` is that of the stored 16-bit tensors. The rounding sees the 16-bit
    factors.

    spans  (n, K) to smooth in place of this weight: those of all layers that read this input
    """
    weight = weight.float()
    if spec.fmt.low_rank:
        factor = to_16bit(smooth.from_weight_spans(weight if spans is None else spans, recipe.smooth_power), dtype)
        layer = data_free(weight, None, spec, factor, recipe, dtype).layer(spec, dtype)
    else:
        layer = Layer(spec, spec.fmt.encode_weight(weight, dtype))
    if spec.act_unsigned != (0, 0):
        shift = shifted_bias_term(layer.decode_weight(), layer["smooth_factor"], spec.act_unsigned)
        bias = (-shift if bias is None else bias.float() - shift).to(dtype)
    return QuantizedLayer(layer, bias, weight_error(weight, layer))


def data_free(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    spec: LayerSpec,
    factor: torch.Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    search: bool = True,
) -> Fit:
    """min ||W s - L - Q|| by turns over L of rank r and Q on the 4-bit grid, at a given smoothing

    search  False: absmax scales, one turn; what SVDQuant is without its search
    """
    target, rounded, best = weight * factor, torch.zeros_like(weight), None
    for _ in range(max(1, recipe.alternations) if search else 1):
        down, up = lowrank.split(target - rounded, spec.rank, recipe.seed)
        # the stored branch sees the unsmoothed activation, and rounding to 16 bit is part of what it is
        proj_down, proj_up = to_16bit(down / factor[:, None], dtype), to_16bit(up, dtype)
        residual = target - proj_up @ (proj_down * factor[:, None]).T
        scales = (searched_scales if search else absmax_scales)(residual, spec.fmt, dtype)
        rounded = scales.round(residual)
        error = (residual - rounded).norm().item()
        if best is not None and error >= best[0]:
            break
        new_bias = corrected_bias(residual, rounded, bias, spec, factor, None, factor)
        best = error, Fit(factor, rounded, scales, proj_down, proj_up, new_bias)
        if not spec.rank:
            break
    return best[1]


def weight_error(weight: torch.Tensor, layer: Layer) -> float:
    """||W - dense(layer)|| / ||W||"""
    scale = weight.norm()
    return ((weight - layer.dense_weight()).norm() / torch.where(scale == 0, 1, scale)).item()


def quantize_group(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    specs: Sequence[LayerSpec],
    recipe: Recipe,
    dtype: torch.dtype,
    entry: Entry | None,
) -> list[QuantizedLayer]:
    """The layers that read one activation, (N_i, K) each: one smoothing, then each on its own.

    entry  statistics of that activation; with None, or too few tokens, the layers are made without data
    """
    begun = time.perf_counter()
    note = _why_not(entry, recipe, specs[0])
    if note is not None:
        spans = torch.stack([weight.float().abs().amax(0) for weight in weights])
        made = [quantize_layer(*parts, recipe, dtype, spans) for parts in zip(weights, biases, specs, strict=True)]
        if recipe.needs_data and specs[0].fmt.low_rank:
            for layer in made:
                layer.record["notes"] = [note]
    else:
        made = _with_data(weights, biases, specs, recipe, dtype, entry)
    for layer in made:
        layer.record["seconds"] = (time.perf_counter() - begun) / len(made)
    return made


def _why_not(entry: Entry | None, recipe: Recipe, spec: LayerSpec) -> str | None:
    if not recipe.needs_data or not spec.fmt.low_rank:
        return "the recipe needs no data"
    if entry is None:
        return "made without data: the statistics do not hold this layer"
    wanted = max(32, int(FEWEST_TOKENS * spec.k))
    if entry.kept < wanted:
        return f"made without data: {entry.kept} tokens were seen, needed {wanted}"
    return None


def _with_data(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    specs: Sequence[LayerSpec],
    recipe: Recipe,
    dtype: torch.dtype,
    entry: Entry,
) -> list[QuantizedLayer]:
    weights = [weight.float() for weight in weights]
    # unsigned activations need a bias for their shift, also where the model has none
    biases = [
        bias.to(weight) if bias is not None else weight.new_zeros(spec.n) if spec.act_unsigned != (0, 0) else None
        for bias, weight, spec in zip(biases, weights, specs, strict=True)
    ]
    parts = list(zip(weights, biases, specs, strict=True))
    tokens, of_tokens = entry.part(hold=False)
    held, buckets = entry.part(hold=True)
    if not len(held):
        held, buckets = tokens, of_tokens

    def measured(fits: Iterable[Fit]) -> list[tuple[Fit, Errors]]:
        return [(fit, output_errors(fit, *part, held, buckets, BUCKETS)) for fit, part in zip(fits, parts, strict=True)]

    device = weights[0].device
    centred = recipe.centring and specs[0].act_bits == 4
    act_mean = mean_of(tokens, specs[0], dtype, device) if centred else None
    fits = _candidates(parts, entry, tokens, recipe, dtype, act_mean)
    tried = {name: measured(found) for name, found in fits.items()}
    # one smoothing serves the whole group, so it is kept or dropped as a whole
    chosen = min(tried, key=lambda name: sum(errors.total**2 for _, errors in tried[name]))
    notes = ["kept the plain SVDQuant: nothing else was better on held-out tokens"] if chosen == PLAIN else []
    if recipe.hessian_block < specs[0].k:
        notes.append(f"block-diagonal Hessian of {recipe.hessian_block} of {specs[0].k} columns")
    made = []
    for (weight, bias, spec), (fit, errors), (_, floor) in zip(parts, tried[chosen], tried[PLAIN], strict=True):
        record = {
            "tokens": len(tokens),
            "held_out": len(held),
            "output_error": errors.total,
            "activation_part": errors.activation,
            "weight_part": errors.weight,
            "by_bucket": list(errors.by_bucket),
            "plain_error": floor.total,
            "chosen": chosen,
            "notes": list(notes),
        }
        layer = fit.layer(spec, dtype)
        new_bias = None if bias is None else fit.bias.to(dtype)
        made.append(QuantizedLayer(layer, new_bias, weight_error(weight, layer), record))
    return made


def _candidates(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor | None, LayerSpec]],
    entry: Entry,
    tokens: torch.Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    act_mean: torch.Tensor | None,
) -> dict[str, list[Fit]]:
    """name -> one fit per layer; the best on held-out tokens will be kept, the first of equals"""
    weights, spec = [weight for weight, _, _ in parts], parts[0][2]
    inputs = _inputs(tokens, entry, spec, weights[0].device)
    found = {}
    if recipe.smoothing == "grid":
        found[recipe.name] = [svdquant(*part, tokens, recipe, dtype) for part in parts]
    else:
        rank = max(spec.rank for _, _, spec in parts)
        seen = inputs if act_mean is None else _inputs(tokens, entry, spec, weights[0].device, act_mean)
        factor = to_16bit(smooth.search(weights, seen, spec, rank, recipe.seed, recipe.adam_steps), dtype)
        variants = {recipe.name: recipe}
        if recipe.input_noise and len(tokens) >= NOISE_TOKENS * spec.k:
            variants[f"{recipe.name}, noise taken as independent"] = replace(recipe, input_noise=False)
        for name, variant in variants.items():
            found[name] = [
                refine(*part, factor, tokens, variant, dtype, largest=recipe.hessian_block, act_mean=act_mean)
                for part in parts
            ]
    found[PLAIN] = [_plain(*part, inputs, weights, recipe, dtype) for part in parts]
    return found


def _inputs(
    tokens: torch.Tensor, entry: Entry, spec: LayerSpec, device: torch.device, act_mean: torch.Tensor | None = None
) -> smooth.Inputs:
    """What smoothing looks at: kept tokens, and the largest value that was ever seen in each channel."""
    stride = max(1, len(tokens) // SMOOTHING_TOKENS)
    ones = torch.ones(spec.k, device=device)
    x = torch.cat(list(smoothed_chunks(tokens[::stride], ones, spec)))
    seen = entry.channel_absmax().to(device)
    start, stop = spec.act_unsigned
    seen[start:stop] = 0  # the shift moves the range: there the kept tokens have to do
    if act_mean is not None:
        x -= act_mean
        seen -= act_mean.abs()
    return smooth.Inputs.of(x, absmax=torch.maximum(x.abs().amax(0), seen))


def _plain(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    spec: LayerSpec,
    inputs: smooth.Inputs,
    weights: Sequence[torch.Tensor],
    recipe: Recipe,
    dtype: torch.dtype,
) -> Fit:
    """SVDQuant without search: spans to the power of one half, one SVD, absmax scales."""
    span = torch.stack([other.abs().amax(0) for other in weights]).amax(0)
    factor = to_16bit(smooth.from_spans(inputs.absmax, span, 0.5, 0.5).clamp(*smooth.LIMITS), dtype)
    return data_free(weight, bias, spec, factor, recipe, dtype, search=False)
