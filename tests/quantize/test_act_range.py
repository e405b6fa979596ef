"""Which activations w4a4 holds: alike at every power of two inside the stated range; what the quantizer does beyond."""

from dataclasses import replace

import pytest
import torch

from svdquant_pack.kernels import FORMATS, Layer, LayerSpec, svdquant_linear
from svdquant_pack.quantize.calibration.file import Statistics
from svdquant_pack.quantize.calibration.tokens import ModelCall
from svdquant_pack.quantize.maker.group import LayerGroup, make_group, quantize_layer
from svdquant_pack.quantize.maths import smooth
from svdquant_pack.quantize.maths.layer import Dense, Making
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.kernels.layers import random_layer

BF16 = torch.bfloat16
N, K = 128, 256
SPREADS = (0.0, 0.5, 1.0, 1.5)  # of the sizes of the weight's channels, log-normal


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y - exact).norm() / exact.norm()).item()


def activations(layer: Layer, low: float, high: float, seed: int) -> torch.Tensor:
    """(32, K) float32 of which every group has, after smoothing, an extreme between low and high."""
    generator = torch.Generator().manual_seed(seed)
    size = layer.spec.fmt.group_size
    groups = torch.randn(32, layer.spec.k // size, size, generator=generator)
    wanted = low * (high / low) ** torch.empty(32, layer.spec.k // size, 1).uniform_(0.02, 0.98, generator=generator)
    z = groups / groups.abs().amax(-1, keepdim=True) * wanted
    return z.flatten(1) * layer["smooth_factor"].float()


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("power", [-20, -9, -3, 1, 4, 11])
def test_a_power_of_two_changes_nothing_within_the_range(format, power):
    """y(2^k x) = 2^k y(x), bit for bit"""
    layer = random_layer(format, N, K, rank=16, dtype=torch.float16, seed=power + 30)
    low, high = FORMATS[format].act_range or (1e-3, 1e3)
    if FORMATS[format].act_range:
        low, high = max(low, low / 2.0**power), min(high, high / 2.0**power)
    if low > high:
        pytest.skip("the range is not that wide")
    x = activations(layer, low, high, seed=power)
    y = svdquant_linear(x, layer, compute="w4a4")
    assert torch.equal(svdquant_linear(x * 2.0**power, layer, compute="w4a4"), y * 2.0**power)


@pytest.mark.parametrize("beyond", [0.25, 4.0])
def test_nvfp4_is_another_one_beyond_its_range(beyond):
    """So the stated range is the range."""
    layer = random_layer("nvfp4", N, K, rank=0, dtype=torch.float16)
    low, high = FORMATS["nvfp4"].act_range
    edge = (low, 1.5 * low) if beyond < 1 else (high / 1.5, high)
    x = activations(layer, *edge, seed=1)
    y = svdquant_linear(x, layer, compute="w4a4")
    assert not torch.equal(svdquant_linear(x * beyond, layer, compute="w4a4"), y * beyond)


def weight_of(spread: float) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    return weight * torch.exp(spread * torch.randn(K, generator=generator)), generator


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("place", ["heavy", "median", "light"])
def test_fast_is_not_worse_than_plain_rounding_whatever_the_outlier(format, spread, place):
    """Plain: the nearest codes at absmax scales, no smoothing and no branch; one channel of the input is far larger."""
    weight, generator = weight_of(spread)
    making = Making(Recipe.named("fast", format=format, rank=16), BF16)
    fast = quantize_layer(Dense(weight, None, LayerSpec(format, N, K, 16)), making).layer
    codes = dict(FORMATS[format].encode_weight(weight, BF16))
    plain = Layer(LayerSpec(format, N, K), codes | {"smooth_factor": torch.ones(K, dtype=BF16)})
    x = torch.randn(64, K, generator=generator)
    channel = weight.abs().amax(0).argsort()[{"heavy": -1, "median": K // 2, "light": 0}[place]]
    for outlier in (1e3, 1e4, 1e5):
        x[:, channel] = x[:, channel].sign() * outlier
        exact = x @ weight.T
        error, floor = (relative(svdquant_linear(x, layer, compute="w4a4"), exact) for layer in (fast, plain))
        assert error <= floor, outlier


def test_without_data_no_activation_grows_by_smoothing():
    for spread in (*SPREADS, 3.0):
        s = smooth.from_weight_spans(weight_of(spread)[0], 0.5)
        raised = smooth.above_one(s, FORMATS["nvfp4"])
        assert raised.min() >= 1 and raised.min() < 2
        assert smooth.above_one(s, FORMATS["int4"]) is s
    assert torch.equal(smooth.above_one(torch.full((4,), 3.0), FORMATS["nvfp4"]), torch.full((4,), 3.0))


def statistics_of(path, tokens: torch.Tensor):
    made = Statistics.create(path, {"layer": tokens.shape[1]}, len(tokens), {"family": "generic", "shared": {}})
    entry, generator = made.entries["layer"], torch.Generator().manual_seed(1)
    for step, part in enumerate(tokens.chunk(4)):
        assert entry.observe(part[None], ModelCall(step, 4, (0,), 1), generator)
    return entry


@pytest.mark.parametrize("recipe", ["balanced", "svdquant"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e4])
def test_with_data_what_was_seen_fits(tmp_path, recipe, size):
    """Activations of any size give the error of usual ones: a common factor goes into the weight's scale."""
    weight, generator = weight_of(0.5)
    x = torch.randn(512, K, generator=generator) * torch.exp(0.5 * torch.randn(K, generator=generator))
    errors, notes = {}, {}
    for factor in (1.0, size):
        inputs = statistics_of(tmp_path / f"{factor}.safetensors", x * factor)
        making = Making(Recipe.named(recipe, format="nvfp4", rank=16, rounds=1), BF16)
        group = LayerGroup([Dense(weight, None, LayerSpec("nvfp4", N, K, 16))], inputs)
        (made,) = make_group(group, making)
        y = svdquant_linear(x * factor, made.layer, made.bias, compute="w4a4")
        errors[factor], notes[factor] = relative(y, x * factor @ weight.T), made.record["notes"]
    assert errors[size] < 1.1 * errors[1.0]
    assert not any("nvfp4" in note for note in notes[size])


def test_one_large_token_fits_where_that_costs_little_and_else_is_noted():
    weight, generator = weight_of(0.5)
    rows, spec = torch.randn(256, K, generator=generator), LayerSpec("nvfp4", N, K, 16)
    for outlier, fits in ((1e3, True), (1.5e4, True), (1e7, False)):
        x = rows.clone()
        x[5, 7] = outlier
        inputs = smooth.Inputs.of(x)
        s = smooth.search([weight], replace(inputs, rows=rows), spec, 0, 0)
        said = smooth.out_of_range(s, inputs, spec.fmt)
        assert (said is None) is fits, said
        assert (inputs.square.sqrt() / s).median() > 1 / 16, "most activations keep their bits"
    assert "nvfp4 cuts them to 2688" in said
    assert smooth.out_of_range(s, inputs, FORMATS["int4"]) is None


def test_activations_that_are_too_small_are_noted():
    inputs = smooth.Inputs.of(torch.randn(64, K, generator=torch.Generator().manual_seed(0)))
    assert smooth.out_of_range(torch.ones(K), inputs, FORMATS["nvfp4"]) is None
    assert "nvfp4 is exact from 0.0938" in smooth.out_of_range(torch.full((K,), 1e3), inputs, FORMATS["nvfp4"])


def test_the_groups_of_a_token_are_looked_at_and_not_the_tokens_of_a_channel():
    """One large token and one large group: every channel has a large number, and most groups are below the range."""
    rows = torch.full((8, K), 1e-3)
    rows[0], rows[:, :16] = 1, 1
    assert "nvfp4 is exact from" in smooth.out_of_range(torch.ones(K), smooth.Inputs.of(rows), FORMATS["nvfp4"])


def test_spans_that_are_no_numbers_smooth_nothing():
    act, weight = torch.tensor([0.0, 4.0, 4.0, 1e38, 0.0]), torch.tensor([2.0, 0.0, 2.0, 1e-38, 0.0])
    assert smooth.from_spans(act, weight, 0.5, 1.0).tolist() == [1, 1, 1, 1, 1]
    assert smooth.from_spans(act, weight, 1.0, 0.0).tolist() == [1, 1, 4, pytest.approx(1e38), 1]
    assert smooth.from_spans(act, weight, 0.5, 0.0).tolist() == [1, 1, 2, pytest.approx(1e19), 1]


def test_unsigned_groups_have_15_steps_and_the_others_7():
    model = smooth.NoiseModel.of(LayerSpec("int4", N, K, act_unsigned=(64, 192)), torch.device("cpu"), gptq=False)
    assert model.steps.tolist() == [7, 15, 15, 7] and model.weight_gain == 1


def searchable(rows: int = N) -> tuple[torch.Tensor, smooth.Inputs]:
    """A weight and an input whose channels differ in size, each in its own way."""
    generator = torch.Generator().manual_seed(3)
    weight, x = (
        torch.randn(size, K, generator=generator) * torch.exp(torch.randn(K, generator=generator))
        for size in (rows, 512)
    )
    return weight, smooth.Inputs.of(x)


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_the_search_starts_from_the_rule_of_least_noise(format):
    """Of those by absolute maximum and of those by mean square, with what GPTQ leaves of the weight's noise."""
    (weight, inputs), spec = searchable(), LayerSpec(format, N, K)
    model = smooth.NoiseModel.of(spec, weight.device, gptq=True)
    roots = inputs.square.sqrt(), weight.square().mean(0).sqrt()
    found = model.cost(smooth.search([weight], inputs, spec, 0, 0).log(), inputs, weight)
    for act, span in ((inputs.absmax, weight.abs().amax(0)), roots, (inputs.absmax, roots[1])):
        for a, b in smooth.EXPONENTS:
            s = smooth.from_spans(act, span, a, b).clamp(*smooth.LIMITS)
            assert found <= model.cost(s.log(), inputs, weight) * (1 + 1e-5)


def test_the_search_looks_at_evenly_spread_rows_of_a_large_weight(monkeypatch):
    monkeypatch.setattr(smooth, "ROWS", 64)
    (weight, inputs), spec = searchable(129), LayerSpec("int4", 129, K)
    found = smooth.search([weight], inputs, spec, 0, 0)
    assert torch.equal(found, smooth.search([weight[::3]], inputs, spec, 0, 0))
    assert torch.equal(found, smooth.search([weight[:50], weight[50:]], inputs, spec, 0, 0))
    assert not torch.equal(found, smooth.search([weight[1::3]], inputs, spec, 0, 0))


def test_the_smoothing_stays_where_float16_has_its_bits():
    weight, generator = weight_of(0.5)
    for size in (1e-30, 1e-6, 1e30):
        x = torch.randn(64, K, generator=generator) * size
        s = smooth.search([weight], smooth.Inputs.of(x), LayerSpec("nvfp4", N, K, 16), 0, 0)
        assert torch.equal(s.half().isfinite(), torch.ones(K, dtype=torch.bool)) and s.min() >= 2.0**-14
