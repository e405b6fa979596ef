"""Rounding to the grid: the formats' own rules in other words, and scales that are the best of their candidates."""

import pytest
import torch

from svdquant_pack.kernels import FORMATS, Layer, LayerSpec
from svdquant_pack.kernels.formats.nvfp4 import SEARCHED_FACTORS
from svdquant_pack.quantize.maths.inputs import round_activation
from svdquant_pack.quantize.maths.rounding import absmax_scales, searched_scales

BF16 = torch.bfloat16


def matrix(n: int = 24, k: int = 128, seed: int = 0) -> torch.Tensor:
    """Gaussian with outliers, a zero group and a denormal one."""
    made = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    made[0, :64], made[1, :64], made[:, 5] = 0, 1e-30, made[:, 5] * 20
    return made


def test_absmax_scales_are_the_formats_own_encoding():
    weight, fmt = matrix(), FORMATS["int4"]
    scales, stored = absmax_scales(weight, fmt, BF16), fmt.encode_weight(weight, BF16)
    assert torch.equal(scales.stored["wscales"], stored["wscales"])
    assert torch.equal(scales.round(weight), fmt.decode_weight(stored))


def test_the_scale_of_an_nvfp4_tensor_is_one_that_bf16_has_and_costs_nothing():
    weight, fmt = matrix(), FORMATS["nvfp4"]
    scales, stored = absmax_scales(weight, fmt, BF16), fmt.encode_weight(weight, BF16)
    upper = scales.stored["wtscale"]
    assert upper == upper.bfloat16() and 1 <= upper / stored["wtscale"] < 1.01
    errors = [(values - weight).norm() for values in (scales.round(weight), fmt.decode_weight(stored))]
    assert errors[0] < 1.02 * errors[1]


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("find", [absmax_scales, searched_scales])
def test_decoding_what_is_stored_gives_the_rounded_values(format, find):
    weight = matrix(seed=1)
    scales = find(weight, FORMATS[format], BF16)
    rounded = scales.round(weight)
    decoded = FORMATS[format].decode_weight(scales.encode(rounded))
    assert torch.equal(decoded, rounded)
    Layer(LayerSpec(format, 24, 128), {**scales.encode(rounded), "smooth_factor": torch.ones(128)})


def test_searched_int4_scales_are_the_best_of_twelve_shrinks_and_two_signs():
    weight, importance = matrix(6, 64, 3), torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    scales = searched_scales(weight, FORMATS["int4"], BF16, importance)
    found = ((scales.round(weight) - weight).square() * importance).double().sum(1)
    for row in range(2, 6):
        errors = []
        for shrink in torch.linspace(0.62, 1, 12):
            for sign in (1, -1):
                step = (sign * shrink * weight[row].abs().amax() / 7).to(BF16).double()
                near = (weight[row].double() / step).round().clamp(-8, 7) * step
                errors.append(((near - weight[row]).square() * importance).sum())
        assert found[row] == pytest.approx(min(errors).item(), rel=1e-4)


def test_code_minus_eight_and_negative_steps_are_used():
    scales = searched_scales(matrix(64, 128, 4), FORMATS["int4"], BF16)
    codes = (scales.round(matrix(64, 128, 4)).unflatten(-1, (-1, 64)) / scales.step[..., None]).nan_to_num().round()
    assert codes.min() == -8 and codes.max() == 7 and (scales.step < 0).any() and (scales.step > 0).any()


def test_searched_nvfp4_scales_are_never_worse_than_absmax_and_use_4_over_6():
    weight = matrix(64, 128, 5)
    plain = absmax_scales(weight, FORMATS["nvfp4"], BF16)
    found = searched_scales(weight, FORMATS["nvfp4"], BF16)
    assert (found.round(weight) - weight).norm() < 0.97 * (plain.round(weight) - weight).norm()
    ratio = found.step / (weight.unflatten(-1, (-1, 16)).abs().amax(-1) / 6)
    assert len(SEARCHED_FACTORS) == 10 and (ratio > 1.4).any()  # 1.5: absmax sits on the code 4


@pytest.mark.parametrize(
    ("format", "unsigned", "rule"),
    [
        ("int4", (0, 0), "absmax"),
        ("int4", (64, 192), "absmax"),
        ("int4", (0, 0), "signed_extreme"),
        ("int4", (128, 192), "signed_extreme"),
        ("nvfp4", (0, 0), "absmax"),
        ("nvfp4", (0, 0), "four_six"),
    ],
)
def test_activations_round_as_the_kernels_do(format, unsigned, rule):
    spec = LayerSpec(format, 8, 192, 0, unsigned, rule)
    z = torch.randn(40, 192, generator=torch.Generator().manual_seed(2)) * torch.logspace(-4, 3, 40)[:, None]
    z[3], z[4, :64] = 0, 0
    codes, scales = spec.fmt.quantize_activation(z, unsigned, rule)
    assert torch.equal(round_activation(z, spec), spec.fmt.decode_activation(codes, scales, unsigned))


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_the_better_activation_rules_are_better(format):
    z = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
    rules = LayerSpec(format, 8, 256).fmt.act_rules
    errors = [(round_activation(z, LayerSpec(format, 8, 256, act_rule=rule)) - z).norm() for rule in rules]
    assert errors[1] < 0.95 * errors[0]


def test_signed_extreme_puts_the_extreme_on_code_minus_eight():
    spec = LayerSpec("int4", 8, 64, act_rule="signed_extreme")
    for sign in (1, -1):
        z = torch.linspace(-1, 1, 64)[None] * 0.5
        z[0, 10] = sign * 3.0
        codes, scales = spec.fmt.quantize_activation(z, (0, 0), spec.act_rule)
        assert codes[0, 10] == 8 and scales[0, 0] == pytest.approx(-sign * 3 / 8)
