"""Third step, make: the 4-bit layers that read one activation; without data, by our recipes, or by the reference.

`make_group` is a pure function: what it needs comes as arguments, which it leaves as they are, and what it makes is
what it returns. It knows no file and no other group, so it can run anywhere.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ...kernels.layer import Layer, LayerSpec, shifted_bias_term
from ..calibration.tokens import BUCKETS, InputStatistics
from ..maths import smooth as smoothing
from ..maths.fit import NOISE_TOKENS, data_free, refine, svdquant
from ..maths.inputs import LayerInput, mean_of, to_16bit
from ..maths.layer import Dense, FittedLayer, Making, output_errors
from ..maths.rows import rows_of
from ..recipe import HESSIAN_STEP

SMOOTHING_TOKENS = 4096  # of the kept ones, for spans and the noise model
PLAIN = "plain"  # SVDQuant without search, which every layer has to beat
FEWEST_TOKENS = 0.25  # per input channel; with fewer, fitting to them does more harm than good


@dataclass(frozen=True)
class LayerOutcome:
    """What became of a layer: made, made with 8-bit activations (`eight`), or kept in 16 bit (`kept`).

    layer   None for a layer that stays in 16 bit
    bias    of the 4-bit layer, None if it has none
    record  for the report, plain data: sizes, errors, what was chosen; "eight" and "kept" say why
    """

    layer: Layer | None
    bias: torch.Tensor | None
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerGroup:
    """The layers that read one activation, and all that has to be known to make them.

    inputs  statistics of that activation; with None, or too few tokens, the layers are made without data
    eight   why each has 8-bit activations, where that was decided before
    widen   whether the group may be made again with 8-bit activations if its error is too large
    shared  whether they are fitted as one layer, with one proj_down, and kept in 16 bit together if at all
    """

    layers: Sequence[Dense]
    inputs: InputStatistics | None = None
    eight: Sequence[str | None] = ()
    widen: bool = False
    shared: bool = False


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer as it came out, before anything is decided about it.

    bias          None if it has none
    weight_error  ||W - dense(layer)|| / ||W||
    record        output errors on held-out tokens, what was chosen and why
    """

    layer: Layer
    bias: torch.Tensor | None
    weight_error: float
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output_error(self) -> float:
        """0 where it was not measured"""
        return self.record.get("output_error", 0.0)


def make_group(group: LayerGroup, making: Making) -> tuple[LayerOutcome, ...]:
    """One outcome per layer; one smoothing serves all, and where they share it one low-rank branch

    A group whose measured error is above `fallback` is made again with 8-bit activations where it may be; a layer that
    is above it even so stays in 16 bit.
    """
    limit, eight = making.recipe.fallback, group.eight or [None] * len(group.layers)
    made = _make_within_memory(group, group.layers, making)
    worst = max(one.output_error for one in made)
    if limit and worst > limit and group.widen and group.layers[0].spec.act_bits == 4:
        eight = [
            f"output error {one.output_error:.3f} is above {limit:g}"
            if one.output_error > limit
            else "its group's error is too large"
            for one in made
        ]
        made = _make_within_memory(group, [dense.with_8bit_activations() for dense in group.layers], making)
    worst = max(one.output_error for one in made)
    errors = [worst if group.shared else one.output_error for one in made]
    return tuple(_outcome(*each, making) for each in zip(made, eight, errors, strict=True))


def _outcome(one: QuantizedLayer, eight: str | None, error: float, making: Making) -> LayerOutcome:
    """`error` decides about 16 bit: its own, or the largest of the layers that share a branch with it"""
    spec, limit = one.layer.spec, making.recipe.fallback
    record = {
        "format": spec.format,
        "shape": [spec.n, spec.k],
        "rank": spec.rank,
        "act_bits": spec.act_bits if spec.fmt.low_rank else 16,
        "bytes": one.layer.nbytes(),
        "weight_error": one.weight_error,
        **one.record,
    }
    # with a target size every byte is spent already, and the budget has decided what stays in 16 bit
    if limit and error > limit and not making.recipe.target_size:
        even = ", with 8-bit activations too" if spec.act_bits == 8 else ""
        return LayerOutcome(None, None, record | {"kept": f"output error {error:.3f} is above {limit:g}{even}"})
    bias = None if one.bias is None else one.bias.to("cpu", making.dtype)
    return LayerOutcome(one.layer.to("cpu"), bias, record | ({"eight": eight} if spec.act_bits == 8 else {}))


def _make_within_memory(group: LayerGroup, layers: Sequence[Dense], making: Making) -> list[QuantizedLayer]:
    """With a Hessian of smaller blocks where memory does not suffice, as the record says"""
    while True:
        try:
            return _make(replace(group, layers=layers), making)
        except (RuntimeError, MemoryError) as error:
            half = min(making.recipe.hessian_block, layers[0].spec.k) // 2 // HESSIAN_STEP * HESSIAN_STEP
            if half == 0 or not making.recipe.needs_data or not _is_out_of_memory(error):
                raise
            making = replace(making, recipe=replace(making.recipe, hessian_block=half))


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for GPUs only."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _make(group: LayerGroup, making: Making) -> list[QuantizedLayer]:
    begun = time.perf_counter()
    layers, inputs = group.layers, group.inputs
    spec, recipe = layers[0].spec, making.recipe
    if not spec.fmt.low_rank or not recipe.needs_data:
        made = _without_data(group, making)
    elif inputs is None:
        made = _without_data(group, making, "the statistics do not hold this layer")
    elif inputs.kept < (wanted := max(32, int(FEWEST_TOKENS * spec.k))):
        made = _without_data(group, making, f"{inputs.kept} tokens were seen, needed {wanted}")
    else:
        made = _with_data(replace(group, layers=[dense.floats(making.device) for dense in layers]), inputs, making)
    seconds = (time.perf_counter() - begun) / len(layers)
    return [replace(one, record={**one.record, "seconds": seconds}) for one in made]


def _without_data(group: LayerGroup, making: Making, why: str = "") -> list[QuantizedLayer]:
    layers = group.layers
    if group.shared:
        made = _apart(quantize_layer(Dense.stacked(layers), making), layers)
    else:
        spans = torch.stack([dense.weight.to(making.device).float().abs().amax(0) for dense in layers])
        made = [quantize_layer(dense, making, spans) for dense in layers]
    return [replace(one, record={"notes": [f"made without data: {why}"]}) for one in made] if why else made


def _apart(one: QuantizedLayer, layers: Sequence[Dense]) -> list[QuantizedLayer]:
    """The layers that were quantized as one."""
    found, start = [], 0
    for dense in layers:
        rows = slice(start, start + dense.spec.n)
        layer = Layer(dense.spec, rows_of(one.layer.tensors, one.layer.spec, rows))
        bias = None if one.bias is None else one.bias[rows].contiguous()
        weight = dense.weight.to(one.layer["qweight"].device).float()
        found.append(QuantizedLayer(layer, bias, weight_error(weight, layer)))
        start = rows.stop
    return found


def quantize_layer(dense: Dense, making: Making, spans: torch.Tensor | None = None) -> QuantizedLayer:
    """W * smooth = up @ down.T + decode(qweight) without data: smooth, split, round, a few times; the best is kept

    The rounding sees the 16-bit factors.

    spans  (n, K) to smooth in place of this weight: those of all layers that read this input
    """
    spec, weight = dense.spec, dense.weight.to(making.device).float()
    bias = None if dense.bias is None else dense.bias.to(making.device)
    if spec.fmt.low_rank:
        smooth = smoothing.from_weight_spans(weight if spans is None else spans, making.recipe.smooth_power)
        smooth = smoothing.above_one(smooth, spec.fmt) if spec.act_bits == 4 else smooth
        fit = data_free(Dense(weight, None, spec), to_16bit(smooth, making.dtype), making)
        layer = fit.layer(spec, making.dtype)
    else:
        layer = Layer(spec, spec.fmt.encode_weight(weight, making.dtype))
    if spec.act_unsigned != (0, 0):
        shift = shifted_bias_term(layer.decode_weight(), layer["smooth_factor"], spec.act_unsigned)
        bias = (-shift if bias is None else bias.float() - shift).to(making.dtype)
    return QuantizedLayer(layer, bias, weight_error(weight, layer))


def weight_error(weight: torch.Tensor, layer: Layer) -> float:
    """||W - dense(layer)|| / ||W||"""
    scale = weight.norm()
    return ((weight - layer.dense_weight()).norm() / torch.where(scale == 0, 1, scale)).item()


def _with_data(group: LayerGroup, inputs: InputStatistics, making: Making) -> list[QuantizedLayer]:
    """The candidate with the least error on held-out tokens, measured for every layer, the plain one included."""
    layers = group.layers
    tokens, buckets = inputs.part(hold=False)
    held, held_buckets = inputs.part(hold=True)
    if not len(held):
        held, held_buckets = tokens, buckets
    tried = {
        name: [
            (fit, output_errors(fit, dense, held, held_buckets, BUCKETS))
            for fit, dense in zip(fits, layers, strict=True)
        ]
        for name, fits in _candidates(group, inputs, tokens, making).items()
    }
    # one smoothing serves the whole group, so it is kept or dropped as a whole
    best = min(tried, key=lambda name: sum(errors.total**2 for _, errors in tried[name]))
    common = {"tokens": len(tokens), "held_out": len(held)}
    notes, recipe = [], making.recipe
    if best == PLAIN:
        notes.append("kept the plain SVDQuant: nothing else was better on held-out tokens")
    if recipe.hessian_block < layers[0].spec.k:
        notes.append(f"block-diagonal Hessian of {recipe.hessian_block} of {layers[0].spec.k} columns")
    made = []
    for dense, (fit, errors), (_, floor) in zip(layers, tried[best], tried[PLAIN], strict=True):
        seen = _seen(tokens, inputs, dense.spec, dense.weight.device, fit.act_mean)
        said = smoothing.out_of_range(fit.smooth, seen, dense.spec.fmt) if dense.spec.act_bits == 4 else None
        record = {
            **common,
            "output_error": errors.total,
            "activation_part": errors.activation,
            "weight_part": errors.weight,
            "by_bucket": list(errors.by_bucket),
            "plain_error": floor.total,
            "chosen": best,
            "notes": [*notes, *([] if said is None else [said])],
        }
        layer = fit.layer(dense.spec, making.dtype)
        made.append(QuantizedLayer(layer, fit.bias, weight_error(dense.weight, layer), record))
    return made


def _each(group: LayerGroup, fit: Callable[[Dense], FittedLayer]) -> list[FittedLayer]:
    """One fit per layer, all from one fit where they share their branch"""
    if group.shared:
        return fit(Dense.stacked(group.layers)).split([dense.spec.n for dense in group.layers])
    return [fit(dense) for dense in group.layers]


def _candidates(
    group: LayerGroup, inputs: InputStatistics, tokens: torch.Tensor, making: Making
) -> dict[str, list[FittedLayer]]:
    """name -> one fit per layer; the best on held-out tokens will be kept, the first of equals"""
    layers = group.layers
    recipe, spec = making.recipe, replace(layers[0].spec, rank=max(dense.spec.rank for dense in layers))
    weights, device = [dense.weight for dense in layers], layers[0].weight.device
    seen = _seen(tokens, inputs, spec, device)
    fits = {}
    if recipe.smoothing == "grid":
        fits[recipe.name] = _each(group, lambda dense: svdquant(dense, tokens, making))
    else:
        centred = recipe.centring and spec.act_bits == 4
        act_mean = mean_of(tokens, spec, making.dtype, device) if centred else None
        around = seen if act_mean is None else _seen(tokens, inputs, spec, device, act_mean)
        smooth = to_16bit(smoothing.search(weights, around, spec, recipe.seed, recipe.adam_steps), making.dtype)
        ways = {recipe.name: making}
        if recipe.input_noise and len(tokens) >= NOISE_TOKENS * spec.k:
            independent = replace(making, recipe=replace(recipe, input_noise=False))
            ways[f"{recipe.name}, noise taken as independent"] = independent
        for name, way in ways.items():
            fits[name] = _each(group, partial(refine, smooth=smooth, tokens=tokens, making=way, act_mean=act_mean))
    span = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    smooth = to_16bit(smoothing.from_spans(seen.absmax, span, 0.5, 0.5).clamp(*smoothing.LIMITS), making.dtype)
    fits[PLAIN] = _each(group, partial(data_free, smooth=smooth, making=making, search=False))
    return fits


def _seen(
    tokens: torch.Tensor,
    inputs: InputStatistics,
    spec: LayerSpec,
    device: torch.device,
    act_mean: torch.Tensor | None = None,
) -> smoothing.Inputs:
    """What smoothing looks at: kept tokens, and the largest value that was ever seen in each channel."""
    x = LayerInput.plain(tokens, spec, device).whole(max(1, len(tokens) // SMOOTHING_TOKENS))
    absmax = inputs.channel_absmax().to(device)
    start, stop = spec.act_unsigned
    absmax[start:stop] = 0  # the shift moves the range: there the kept tokens have to do
    if act_mean is not None:
        x -= act_mean
        absmax -= act_mean.abs()
    return smoothing.Inputs.of(x, absmax=torch.maximum(x.abs().amax(0), absmax))
