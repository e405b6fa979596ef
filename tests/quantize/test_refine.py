"""One layer with data: what is fitted is what is stored, and it beats what it must beat."""

from dataclasses import replace

import pytest
import torch

from svdquant_pack.kernels import LayerSpec, svdquant_linear
from svdquant_pack.kernels.layer import check_values
from svdquant_pack.quantize.files.dialects import stock_layer
from svdquant_pack.quantize.maths import smooth
from svdquant_pack.quantize.maths.fit import refine, svdquant
from svdquant_pack.quantize.maths.inputs import LayerInput, mean_of, round_activation, to_16bit
from svdquant_pack.quantize.maths.layer import Dense, FittedLayer, Making, output_errors
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.bench.synthetic_layers import KINDS, make

BF16 = torch.bfloat16
BALANCED = Making(Recipe.named("balanced"), BF16)
N = 192


def spec_of(layer, format: str, rank: int = 16, rule: str = "absmax") -> LayerSpec:
    unsigned = (0, N) if layer.gelu and format == "int4" else (0, 0)
    return LayerSpec(format, N, N, rank, unsigned, rule)


def searched(layer, spec: LayerSpec, steps: int = 30) -> torch.Tensor:
    shifted = LayerInput.plain(layer.calibration, spec, torch.device("cpu")).whole()
    return to_16bit(smooth.search([layer.weight], smooth.Inputs.of(shifted), spec, 0, steps), BF16)


@pytest.fixture(scope="module", params=KINDS)
def layer(request):
    return make(request.param, N, N, tokens=2048, seed=101, test=256)


@pytest.fixture(scope="module")
def bias():
    return to_16bit(torch.randn(N, generator=torch.Generator().manual_seed(9)), BF16)


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_the_fit_beats_the_reference_and_is_what_the_kernel_computes(layer, bias, format):
    recipe = Recipe.named("balanced", format=format, activation="best")
    spec = spec_of(layer, format, rule=recipe.act_rule)
    mean = mean_of(layer.calibration, spec, BF16, torch.device("cpu"))
    dense, stock = Dense(layer.weight, bias, spec), Dense(layer.weight, bias, spec_of(layer, format))
    fit = refine(dense, searched(layer, spec), layer.calibration, Making(recipe, BF16), mean)
    errors = output_errors(fit, dense, layer.test)
    yardstick = svdquant(stock, layer.calibration, Making(Recipe.named("svdquant", format=format), BF16))
    floor = output_errors(yardstick, stock, layer.test)
    assert errors.total < 0.95 * floor.total
    # both parts are nearly independent noise
    assert errors.total**2 == pytest.approx(errors.activation**2 + errors.weight**2, rel=0.25)
    stored = fit.layer(spec, BF16)
    spec.check(stored.tensors)
    check_values(stored.tensors)
    exact = layer.test @ layer.weight.T
    y = svdquant_linear(layer.test, stored, fit.bias, compute="w4a4")
    seen = ((y - exact - bias).norm() / exact.norm()).item()
    # float32 sums in another order put a few activations into the next code
    assert seen == pytest.approx(errors.total, rel=1e-2)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_centring_helps_where_the_mean_is_large(layer, bias, format, biased):
    """And what it makes is as good as without it for a reader that knows no means."""
    spec, bias = LayerSpec(format, N, N, 16), bias if biased else None
    offset = 4 * layer.calibration.std(0) * torch.randn(N, generator=torch.Generator().manual_seed(3)).sign()
    tokens, test = layer.calibration + offset, layer.test + offset
    exact, errors = test @ layer.weight.T, {}
    mean = mean_of(tokens, spec, BF16, torch.device("cpu"))
    torch.testing.assert_close(mean, tokens.mean(0), rtol=0.01, atol=1e-4)
    for name, act_mean in (("plain", None), ("centred", mean)):
        making = Making(Recipe.named("balanced", rounds=1), BF16)
        fit = refine(Dense(layer.weight, bias, spec), torch.ones(N), tokens, making, act_mean)
        stored = fit.layer(spec, BF16)
        for reader, one in ((name, stored), (f"{name}, means unknown", stock_layer("X", stored, []))):
            y = svdquant_linear(test, one, fit.bias, compute="w4a4") - (0 if bias is None else bias)
            errors[reader] = ((y - exact).norm() / exact.norm()).item()
    assert errors["centred"] < 0.75 * errors["plain"]
    assert errors["centred, means unknown"] < 1.35 * errors["plain"]


def test_unsigned_channels_have_no_mean():
    spec = LayerSpec("int4", 8, 192, 16, (64, 128))
    mean = mean_of(torch.ones(40, 192), spec, BF16, torch.device("cpu"))
    assert not mean[64:128].any() and mean[:64].eq(1).all() and mean[128:].eq(1).all()


def test_bias_correction_removes_the_mean_error(layer, bias):
    spec = spec_of(layer, "int4")
    factor, offsets = searched(layer, spec, 0), {}
    for corrected in (True, False):
        making = Making(Recipe.named("balanced", bias_correction=corrected, rounds=1), BF16)
        fit = refine(Dense(layer.weight, bias, spec), factor, layer.calibration, making)
        y = svdquant_linear(layer.calibration, fit.layer(spec, BF16), fit.bias, compute="w4a4")
        offsets[corrected] = (y - layer.calibration @ layer.weight.T - bias).mean(0).norm()
    assert offsets[True] < 0.02 * offsets[False]


@pytest.mark.parametrize("start_rounds", [0, 2])
def test_zero_rounds_keep_the_branch_of_the_start(layer, bias, start_rounds):
    dense = Dense(layer.weight, bias, spec_of(layer, "int4"))
    errors = {}
    for rounds in (0, 2):
        making = Making(Recipe.named("balanced", rounds=rounds, start_rounds=start_rounds), BF16)
        fit = refine(dense, searched(layer, dense.spec), layer.calibration, making)
        errors[rounds] = output_errors(fit, dense, layer.test).total
    assert errors[2] < errors[0] < 2 * errors[2]


def test_a_layer_without_bias_stays_without(layer):
    spec = spec_of(layer, "nvfp4")
    fit = refine(Dense(layer.weight, None, spec), searched(layer, spec, 0), layer.calibration, BALANCED)
    assert fit.bias is None


def test_smoothing_does_not_change_the_dense_layer(layer):
    """Q = W exactly: whatever the smoothing, y = x W.T."""
    spec = spec_of(layer, "int4")
    factor = searched(layer, spec, 10)
    z = LayerInput(layer.test, factor, LayerSpec("int4", N, N)).whole()
    torch.testing.assert_close(z @ (layer.weight * factor).T, layer.test @ layer.weight.T, rtol=1e-3, atol=1e-2)


def test_adam_lowers_the_noise_model_and_seeds_are_kept_within_limits(layer):
    spec = spec_of(layer, "int4")
    shifted = LayerInput.plain(layer.calibration, spec, torch.device("cpu")).whole()
    inputs, model = smooth.Inputs.of(shifted), smooth.NoiseModel.of(spec, torch.device("cpu"), True)
    costs = []
    for steps in (0, 60):
        factor = smooth.search([layer.weight], inputs, spec, 0, steps)
        assert factor.min() >= smooth.LIMITS[0] and factor.max() <= smooth.LIMITS[1]
        rest = smooth._rest(layer.weight, factor, spec.rank, 0)
        costs.append(model.cost(factor.log(), inputs, rest).item())
    assert costs[1] < 0.97 * costs[0]


def test_the_search_runs_in_inference_mode(layer):
    with torch.inference_mode():
        inputs = smooth.Inputs.of(layer.calibration.clone())
        smooth.search([layer.weight.clone()], inputs, spec_of(layer, "nvfp4"), 0, 4)


def test_the_noise_model_predicts_the_activation_error(layer):
    """Its first term, with the branch and the weight exact, against the error that rounding really makes."""
    spec = spec_of(layer, "int4", rank=0)
    ones = torch.ones(N)
    z = next(LayerInput(layer.calibration, ones, spec).chunks(at_once=384))
    inputs = smooth.Inputs.of(z)
    predicted = replace(smooth.NoiseModel.of(spec, ones.device, True), weight_gain=0.0)
    made = ((round_activation(z, spec) - z) @ layer.weight.T).square().sum(1).mean().item()
    # after a GELU most values are near zero, where a uniform error of one step is too pessimistic
    assert 0.5 < predicted.cost(ones.log(), inputs, layer.weight).item() / made < 2


def test_a_smaller_fit_is_padded_to_the_stored_rank(layer, bias):
    spec = spec_of(layer, "int4", 16)
    small = Dense(layer.weight, bias, replace(spec, rank=4))
    fit = refine(small, torch.ones(N), layer.calibration, BALANCED)
    stored = fit.layer(spec, BF16)
    assert fit.proj_up.shape == (N, 4) and stored["proj_up"].shape == (N, 16) and not stored["proj_up"][:, 4:].any()


def test_dead_channels_and_zero_weights(bias):
    layer = make("adaln", N, N, tokens=512, seed=102, test=64)
    layer.calibration[:, 3], layer.weight[:, 9], layer.weight[5] = 0, 0, 0
    spec = spec_of(layer, "int4")
    dense = Dense(layer.weight, bias, spec)
    fit = refine(dense, searched(layer, spec), layer.calibration, BALANCED)
    assert all(part.isfinite().all() for part in (fit.smooth, fit.rounded, fit.proj_down, fit.proj_up, fit.bias))
    assert output_errors(fit, dense, layer.test).total < 0.2


def test_fewer_tokens_than_channels_do_not_overfit(bias):
    layer = make("adaln", N, N, tokens=48, seed=103, test=256)
    spec = spec_of(layer, "int4")
    dense = Dense(layer.weight, bias, spec)
    few = refine(dense, searched(layer, spec), layer.calibration, BALANCED)
    plain = svdquant(dense, layer.calibration, Making(Recipe.named("svdquant"), BF16))
    errors = [output_errors(fit, dense, layer.test).total for fit in (few, plain)]
    assert errors[0] < 1.3 * errors[1]


def test_gptq_improves_the_reference_on_correlated_inputs(bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, N, generator=generator) @ (
        torch.randn(N, N, generator=generator) * torch.logspace(0, -1.5, N)[:, None]
    )
    dense = Dense(torch.randn(N, N, generator=generator), bias, LayerSpec("int4", N, N, 16))
    fits: list[FittedLayer] = [
        svdquant(dense, x[:1536], Making(Recipe.named(name), BF16)) for name in ("svdquant", "svdquant+gptq")
    ]
    errors = [output_errors(fit, dense, x[1536:]).total for fit in fits]
    assert errors[1] < 0.97 * errors[0]


def test_errors_by_bucket(layer, bias):
    spec = spec_of(layer, "int4")
    dense = Dense(layer.weight, bias, spec)
    fit = refine(dense, torch.ones(N), layer.calibration, Making(Recipe.named("balanced", rounds=1), BF16))
    buckets = torch.arange(len(layer.test)) % 2
    errors = output_errors(fit, dense, layer.test, buckets, 3)
    halves = [output_errors(fit, dense, layer.test[buckets == b]).total for b in (0, 1)]
    assert list(errors.by_bucket[:2]) == pytest.approx(halves) and errors.by_bucket[2] is None


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_the_error_of_rounding_does_not_depend_on_the_unit_of_the_activation(format):
    """NVFP4 has E4M3 scales and nothing above them: what they cannot hold has to be in the smoothing."""
    made = make("attention", N, N, tokens=512, seed=3, test=256)
    spec, errors = LayerSpec(format, N, N, 16), {}
    for unit in (1.0, 1e-3, 3e3):
        inputs = smooth.Inputs.of(unit * made.calibration)
        z = unit * made.test / smooth.search([made.weight], inputs, spec, 0, 0)
        errors[unit] = ((round_activation(z, spec) - z).norm() / z.norm()).item()
    assert max(errors.values()) < 1.25 * errors[1.0]


def test_data_free_smoothing_levels_the_weight_and_has_limits():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, 128)
    weight[:, 5] = 0
    for power in (0.25, 0.5):
        factor = smooth.from_weight_spans(weight, power)
        span = (weight.abs().amax(0).log() - weight.abs().amax(0)[weight.any(0)].log().mean()).exp()
        within = (span > 1e-3) & (span < 1e3)
        torch.testing.assert_close(factor[within], span[within] ** -power)
        assert factor[5] == 1
    assert smooth.from_weight_spans(weight, 1.0).aminmax() == (torch.tensor(1e-2), torch.tensor(1e2))
    assert smooth.from_weight_spans(torch.zeros(4, 128), 0.5).eq(1).all()


def test_the_search_stays_within_its_limits_whatever_the_channels():
    x = torch.randn(256, N, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 9, N)
    weight = torch.randn(N, N, generator=torch.Generator().manual_seed(2))
    factor = smooth.search([weight], smooth.Inputs.of(x), LayerSpec("int4", N, N, 16), 0, 0)
    assert factor.min() >= 1e-2 and factor.max() <= 1e2


def test_the_search_looks_at_tokens_from_all_over_the_sample():
    x = torch.arange(1.0, 4001)[:, None].expand(-1, N)
    inputs = smooth.Inputs.of(x)
    assert len(inputs.rows) == smooth.TOKENS and inputs.rows[-1, 0] > 3500
    assert inputs.absmax.eq(4000).all()
    torch.testing.assert_close(inputs.square, x.square().mean(0))
    assert len(smooth.Inputs.of(x[:100]).rows) == 100
    assert smooth.Inputs.of(x, torch.full((N,), 9.0)).absmax.eq(9).all(), "known from more tokens"


@pytest.mark.parametrize("gptq", [False, True])
def test_the_expected_noise_is_that_of_rounding_both_factors(layer, gptq):
    """Against rounding them to nearest; the gain of GPTQ is on the weight's noise alone."""
    spec, tokens = spec_of(layer, "int4", rank=0), layer.calibration[:48]  # fewer than channels
    found = smooth.ExpectedNoise.of(layer.weight, tokens, spec, gptq)
    z = LayerInput(tokens, found.smooth, spec).whole()
    smoothed = layer.weight * found.smooth
    groups = smoothed.unflatten(1, (-1, 64))
    step = groups.abs().amax(-1, keepdim=True) / 7
    rounded = ((groups / step).round() * step).flatten(1)
    exact, noise = z @ smoothed.T, round_activation(z, spec) - z
    power = exact.square().sum()
    of_act, of_weight = (
        (part.square().sum() / power).item() for part in (noise @ smoothed.T, z @ (rounded - smoothed).T)
    )
    assert 0.5 < found.activation.item() / of_act < 2.2
    assert 0.4 < (found.total - found.activation).item() / (of_weight * (0.5 if gptq else 1)) < 2.5


def test_gptq_halves_what_is_expected_of_the_weight(layer):
    spec, tokens = spec_of(layer, "int4", rank=0), layer.calibration[:48]
    nearest, gptq = (smooth.ExpectedNoise.of(layer.weight, tokens, spec, gptq) for gptq in (False, True))
    assert torch.equal(gptq.activation, nearest.activation)
    torch.testing.assert_close(gptq.total - gptq.activation, 0.5 * (nearest.total - nearest.activation))


def test_the_search_starts_from_the_best_of_its_rules(layer):
    spec = spec_of(layer, "int4", rank=0)
    inputs = smooth.Inputs.of(LayerInput.plain(layer.calibration, spec, torch.device("cpu")).whole())
    model, spans = smooth.NoiseModel.of(spec, torch.device("cpu"), True), (inputs.absmax, layer.weight.abs().amax(0))
    rules = [smooth.from_spans(*spans, a, b) for a, b in ((0.0, 0.0), (0.5, 0.0), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3))]
    costs = [
        model.cost((rule / rule.log().mean().exp()).clamp(1e-2, 1e2).log(), inputs, layer.weight) for rule in rules
    ]
    found = smooth.search([layer.weight], inputs, spec, 0, 0)
    assert model.cost(found.log(), inputs, layer.weight) <= min(costs) * 1.00001 < max(costs)


def test_spans_give_the_rule_and_one_where_a_channel_is_dead():
    act, weight = torch.tensor([4.0, 0.25, 0.0, 1.0, 9.0]), torch.tensor([0.25, 4.0, 1.0, 0.0, 16.0])
    assert smooth.from_spans(act, weight, 0.5, 0.5).tolist() == [4.0, 0.25, 1.0, 1.0, 0.75]
    assert smooth.from_spans(act, weight, 0.5, 0.0).tolist() == [2.0, 0.5, 1.0, 1.0, 3.0]


def test_rules_share_the_range_out_or_leave_the_weight_alone():
    rules = smooth.EXPONENTS
    assert len(set(rules)) == len(rules) == 11 and all(0 <= a < 1 and b in (0, 1 - a) for a, b in rules)


def test_small_numbers_are_fitted_like_large_ones():
    """Nothing but zero counts as nothing."""
    made = make("adaln", N, N, tokens=256, seed=7, test=1)
    spec = spec_of(made, "int4")
    found, small = (
        smooth.search([made.weight * unit], smooth.Inputs.of(made.calibration * unit), spec, 0, 10)
        for unit in (1.0, 1e-4)
    )
    torch.testing.assert_close(small, found, rtol=0.02, atol=0)
    expected = [
        smooth.ExpectedNoise.of(made.weight * unit, made.calibration * unit, spec, False) for unit in (1.0, 1e-4)
    ]
    torch.testing.assert_close(expected[1].total, expected[0].total, rtol=1e-3, atol=0)
    nothing = smooth.search([torch.zeros(N, N)], smooth.Inputs.of(torch.zeros(9, N)), spec, 0, 4)
    assert nothing.isfinite().all()


def test_what_the_search_knows_stays_as_it_is(layer):
    spec = spec_of(layer, "int4", rank=0)
    noise = smooth.ExpectedNoise.of(layer.weight, layer.calibration[:48], spec, True)
    model, inputs = smooth.NoiseModel.of(spec, torch.device("cpu"), True), smooth.Inputs.of(layer.calibration)
    for one, name in ((noise, "total"), (model, "steps"), (inputs, "rows")):
        with pytest.raises(AttributeError):
            setattr(one, name, None)
