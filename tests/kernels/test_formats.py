"""Every format: exact on its own grid, within its bound off it, and the stated rounding rules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdquant_pack.kernels import FORMATS
from svdquant_pack.kernels.formats import by_group, nvfp4
from svdquant_pack.kernels.packing import pack, sign_extend, unpack

ACTIVATIONS = [fmt for fmt in FORMATS.values() if fmt.low_rank]
INT4 = FORMATS["int4"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def sample(seed: int, rows: int, columns: int) -> torch.Tensor:
    """Heavy-tailed values of very different row sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 3 * torch.logspace(-3, 2, rows)[:, None]


# largest error of a weight as a share of its group's absmax: half a step, and for nvfp4 the step from 4 to 6 with the
# rounding of the E4M3 scale on top
BOUNDS = {"int4": 0.5 / 7, "nvfp4": 1 / 6 + 1 / 16, "awq_w4a16": 1 / 15}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), groups=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_a_weight_is_decoded_within_half_a_step(fmt, seed, rows, groups):
    weight = sample(seed, rows, groups * 64)
    error = by_group((fmt.decode_weight(fmt.encode_weight(weight, torch.float32)) - weight).abs(), fmt.group_size)
    allowed = BOUNDS[fmt.name] * 1.0001 * by_group(weight.abs(), fmt.group_size).amax(-1, keepdim=True)
    smallest_scale = weight.abs().max() / 448 * 2**-9  # below it an nvfp4 group scale is zero
    assert (error <= allowed + smallest_scale * (fmt.name == "nvfp4")).all()


@pytest.mark.parametrize("fmt", [FORMATS["int4"], FORMATS["awq_w4a16"]], ids=lambda fmt: fmt.name)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_encoding_a_decoded_weight_changes_nothing(fmt, seed):
    decoded = fmt.decode_weight(fmt.encode_weight(sample(seed, 6, 128), torch.float32))
    again = fmt.decode_weight(fmt.encode_weight(decoded, torch.float32))
    torch.testing.assert_close(again, decoded, rtol=1e-5, atol=1e-6 * decoded.abs().max().item())


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoded_parts_are_what_the_format_says(fmt, dtype):
    encoded = fmt.encode_weight(sample(0, 48, 128), dtype)
    for name, part in fmt.weight_parts(48, 128).items():
        if name in encoded:
            assert tuple(encoded[name].shape) == part.shape and encoded[name].dtype in part.dtypes
        else:
            assert part.optional


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_dead_group_decodes_to_zero(fmt):
    weight = sample(1, 8, 128)
    weight[3] = 0
    assert (fmt.decode_weight(fmt.encode_weight(weight, torch.bfloat16))[3] == 0).all()
    assert (fmt.decode_weight(fmt.encode_weight(weight * 0, torch.bfloat16)) == 0).all()


def test_int4_reads_all_sixteen_codes():
    codes = torch.arange(64).remainder(16)[None].to(torch.uint8)
    tensors = {"qweight": pack(codes), "wscales": torch.ones(1, 1)}
    assert torch.equal(INT4.decode_weight(tensors)[0, :16], torch.tensor([*range(8), *range(-8, 0)]).float())


def test_nvfp4_reads_all_sixteen_codes():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert torch.equal(nvfp4.from_e2m1(torch.arange(16).to(torch.uint8)), torch.tensor(values))


@given(st.floats(-8, 8, width=32))
def test_e2m1_rounds_to_nearest_even(value):
    grid = torch.tensor(nvfp4.E2M1, dtype=torch.float64)
    code = nvfp4.to_e2m1(torch.tensor([value])).item() & 7
    distance = (grid - min(abs(value), 6.0)).abs()
    assert distance[code] == distance.min()
    ties = (distance == distance.min()).nonzero().flatten().tolist()
    assert code in ties and (len(ties) == 1 or code % 2 == 0)


def test_int4_activation_rule_is_the_stated_one():
    x = sample(2, 16, 128).bfloat16()
    nibbles, ascales = INT4.quantize_activation(x)
    groups = x.float().view(16, 2, 64)
    exact = groups.abs().amax(-1) / 7
    assert torch.equal(ascales, exact.bfloat16())
    wanted = (groups * (1 / exact)[..., None]).round().clamp(-8, 7)  # torch rounds half to even
    assert torch.equal(sign_extend(nibbles).float().view(16, 2, 64), wanted)


def test_unsigned_channels_use_the_codes_0_to_15():
    x = torch.rand(5, 192)
    x[:, :64] -= 0.5
    nibbles, ascales = INT4.quantize_activation(x, (64, 192))
    assert nibbles[:, 64:].max() == 15
    torch.testing.assert_close(ascales[:, 1:], x[:, 64:].view(5, 2, 64).amax(-1) / 15)
    decoded = INT4.decode_activation(nibbles, ascales, (64, 192))
    assert ((decoded - x).abs() <= 0.5001 * ascales.repeat_interleave(64, 1)).all()


def test_nvfp4_activation_scale_is_stored_as_e4m3_and_saturates():
    x = torch.cat([sample(3, 4, 32), torch.full((4, 32), 1e6)], 1)
    nibbles, ascales = FORMATS["nvfp4"].quantize_activation(x)
    assert ascales.dtype == torch.float8_e4m3fn and ascales[:, 2:].float().eq(448).all()
    assert (nibbles[:, 32:] == 7).all()
    exact = (x.view(4, 4, 16).abs().amax(-1) / 6).clamp_max(448)
    assert torch.equal(ascales.float(), exact.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("fmt", ACTIVATIONS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_not_hidden(fmt, poison):
    x = torch.randn(3, 128)
    x[1, 70] = poison
    decoded = fmt.decode_activation(*fmt.quantize_activation(x, (0, 0)), (0, 0))
    assert decoded[1].isnan().any() and decoded[[0, 2]].isfinite().all()


@pytest.mark.parametrize("fmt", ACTIVATIONS, ids=lambda fmt: fmt.name)
def test_a_zero_activation_stays_zero(fmt):
    decoded = fmt.decode_activation(*fmt.quantize_activation(torch.zeros(2, 128), (0, 0)), (0, 0))
    assert torch.equal(decoded, torch.zeros(2, 128))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_k_that_is_not_whole_groups_is_refused(fmt):
    with pytest.raises(ValueError, match="not a multiple of the group"):
        fmt.encode_weight(torch.randn(4, fmt.group_size + 2), torch.bfloat16)


def test_unpack_is_used_consistently():
    encoded = INT4.encode_weight(torch.eye(64), torch.float32)
    assert sign_extend(unpack(encoded["qweight"])).diagonal().eq(7).all()
