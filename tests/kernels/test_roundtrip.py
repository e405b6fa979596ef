"""The short way to decode(quantize(x)) gives the numbers of the formats, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdquant_pack.kernels import FORMATS, LayerSpec
from svdquant_pack.kernels.roundtrip import rounded

RULES = [(name, rule) for name in ("int4", "nvfp4") for rule in FORMATS[name].act_rules]


def long_way(act: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    fmt = spec.fmt
    codes, ascales = fmt.quantize_activation(act, spec.act_unsigned, spec.act_rule)
    return fmt.decode_activation(codes, ascales, spec.act_unsigned)


@pytest.mark.parametrize(("format", "rule"), RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [(0, 0), (0, 192), (64, 192), (64, 128)])
def test_equal_to_the_formats(format, rule, dtype, channels):
    spec = LayerSpec(format, 8, 192, act_unsigned=channels if format == "int4" else (0, 0), act_rule=rule)
    act = (torch.randn(1500, 192) * torch.randn(192).exp()).to(dtype)
    act[1] = 0
    act[2, 64:] = 0
    act[3] = torch.arange(192) / 4 - 20  # ties
    act[4] = act[4].clamp(-4, 4) * 3000  # beyond the largest scale of nvfp4
    assert torch.equal(rounded(act, spec), long_way(act, spec))
    assert torch.equal(rounded(act[:7], spec), long_way(act[:7], spec))


@pytest.mark.parametrize(("format", "rule"), RULES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e-42, -1e-42])
def test_extremes_go_the_long_way(format, rule, bad):
    spec = LayerSpec(format, 8, 128, act_unsigned=(64, 128) if format == "int4" else (0, 0), act_rule=rule)
    for column in (3, 100):
        act = torch.zeros(4, 128)
        act[2] = 1e-43 if abs(bad) < 1 else 1
        act[2, column] = bad
        assert torch.equal(rounded(act, spec).nan_to_num(7), long_way(act, spec).nan_to_num(7))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=16, max_size=16), st.sampled_from(RULES))
def test_any_group(values, rule):
    spec = LayerSpec(rule[0], 8, 64, act_rule=rule[1])
    act = torch.tensor(values).repeat(1, 4)
    assert torch.equal(rounded(act, spec), long_way(act, spec))
