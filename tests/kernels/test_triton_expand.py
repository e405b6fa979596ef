"""Triton's expansion of 4-bit weights gives the bytes of the formats."""

import pytest
import torch

from svdquant_pack.kernels import FORMATS
from svdquant_pack.kernels.formats import GELU_SHIFT
from svdquant_pack.kernels.stages import channel_scales_of

launch_expand = pytest.importorskip("svdquant_pack.kernels.backends.triton.launch_expand")
SHAPES = [(96, 256), (37, 192), (130, 64)]


def weight_of(format: str, n: int, k: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    weight = dict(FORMATS[format].encode_weight(torch.randn(n, k, generator=generator) / 16, torch.bfloat16))
    if format == "nvfp4":
        weight["wcscales"] = torch.rand(n, generator=generator) + 0.5
    scales = weight["wscales"].float()
    scales[:, 3] = 0  # a row of zeros
    return {**weight, "wscales": scales.to(weight["wscales"].dtype)}


def expand(format, weight, dtype, device, **arguments):
    weight = {name: tensor.to(device) for name, tensor in weight.items()}
    arguments = {name: part.to(device) if torch.is_tensor(part) else part for name, part in arguments.items()}
    scales = channel_scales_of(weight) if {"wtscale", "wcscales"} & weight.keys() else None
    found = launch_expand.expand(format, weight, dtype, scales, **arguments)
    return [None if tensor is None else tensor.cpu() for tensor in found]


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_rows_bit_for_bit(format, shape, device):
    weight = weight_of(format, *shape)
    codes, scales = expand(format, weight, torch.int8, device)
    wanted, row_scales = FORMATS[format].expand_rows(weight)
    if device.type == "cpu":
        assert torch.equal(codes, wanted)
    else:  # a fused multiply-add may decide a tie otherwise
        assert (codes.int() - wanted.int()).abs().max() <= 1 and (codes != wanted).float().mean() <= 1e-3
    torch.testing.assert_close(scales, row_scales, rtol=1e-6, atol=0)
    assert codes[3].eq(0).all()


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_rows(format, shape, device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    weight = weight_of(format, *shape)
    codes, scales = expand(format, weight, torch.float8_e4m3fn, device)
    wanted, row_scales = FORMATS[format].expand_rows(weight, torch.float8_e4m3fn)
    assert (codes.float() != wanted.float()).float().mean() <= 1e-3
    torch.testing.assert_close(scales, row_scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_16_bit(format, dtype, shape, device):
    weight, smooth = weight_of(format, *shape), torch.rand(shape[1]) + 0.5
    found, shift = expand(format, weight, dtype, device, smooth_factor=smooth)
    wanted = FORMATS[format].decode_weight(weight) / smooth
    assert shift is None
    torch.testing.assert_close(found, wanted.to(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("channels", [(0, 256), (64, 192)])
def test_the_shift_of_unsigned_channels(channels, device):
    weight, smooth = weight_of("int4", 96, 256), torch.rand(256) + 0.5
    _, shift = expand("int4", weight, torch.float32, device, smooth_factor=smooth, unsigned=channels)
    dense = FORMATS["int4"].decode_weight(weight) / smooth
    torch.testing.assert_close(shift, GELU_SHIFT * dense[:, slice(*channels)].sum(1), rtol=1e-5, atol=1e-6)
