"""The reference backend is the formula."""

import pytest
import torch

from svdquant_pack.kernels import FORMATS, Layer, LayerError, LayerSpec, choose, svdquant_linear
from svdquant_pack.kernels.backends import cpu
from svdquant_pack.kernels.dispatch import candidates
from svdquant_pack.kernels.formats import GELU_SHIFT
from svdquant_pack.kernels.layer import check_values, from_blob, shifted_bias_term, to_blob
from svdquant_pack.quantize.files.dialects import stock_layer
from svdquant_pack.tests.kernels.layers import random_layer

FLOATS = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-6}  # one rounding of the output


def formula(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, rounded: bool) -> torch.Tensor:
    """y = Q((x - act_mean + shift) / smooth) @ decode(qweight).T + out_mean + (x @ proj_down) @ proj_up.T + bias

    in float64, as written; the means only where the activation is rounded.
    """
    fmt, spec, x64 = layer.spec.fmt, layer.spec, x.double()
    act = x64
    if fmt.low_rank:
        shift = torch.zeros(spec.k).double()
        shift[slice(*spec.act_unsigned)] = GELU_SHIFT
        centred = rounded and "act_mean" in layer.tensors
        if centred:
            shift -= layer["act_mean"].double()
        act = ((x64 + shift) / layer["smooth_factor"].double()).to(x.dtype)
    if rounded and fmt.low_rank:
        flat = act.reshape(-1, spec.k)
        codes, ascales = fmt.quantize_activation(flat, spec.act_unsigned)
        act = fmt.decode_activation(codes, ascales, spec.act_unsigned).view(act.shape)
    y = act.double() @ layer.decode_weight().double().T
    if fmt.low_rank and centred:
        y = y + layer["out_mean"].double()
    if spec.rank:
        y = y + x64 @ layer["proj_down"].double() @ layer["proj_up"].double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("compute", ["w4a4", "w16"])
@pytest.mark.parametrize("rank", [0, 16, 48])
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3, 5)])
def test_it_is_the_formula(format, dtype, compute, rank, leading):
    layer = random_layer(format, rank=rank, dtype=dtype)
    x, bias = torch.randn(*leading, 256).to(dtype), torch.randn(96).to(dtype)
    y = svdquant_linear(x, layer, bias, compute=compute)
    wanted = formula(x, layer, bias, compute == "w4a4")
    assert y.shape == (*leading, 96) and y.dtype == dtype
    assert (y.double() - wanted).norm() <= FLOATS[dtype] * wanted.norm()


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("compute", ["w4a4", "w16"])
def test_means_are_taken_off_and_added(format, dtype, compute):
    channels = (64, 128) if format == "int4" else (0, 0)
    layer = random_layer(format, act_unsigned=channels, dtype=dtype, centred=True)
    x = (torch.randn(9, 256) + layer["act_mean"].float()).to(dtype)
    for bias in (torch.randn(96).to(dtype), None):
        wanted = formula(x, layer, bias, compute == "w4a4")
        assert (svdquant_linear(x, layer, bias, compute=compute) - wanted).norm() <= FLOATS[dtype] * wanted.norm()


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_means_change_the_rounding_alone(format):
    """Without them the layer is right as well, with a larger error where activations are not around zero."""
    layer = random_layer(format, centred=True)
    plain = stock_layer("X", layer, [])
    x = torch.randn(64, 256) + layer["act_mean"]
    exact = svdquant_linear(x, plain, compute="w16")
    centred, stock = (svdquant_linear(x, one, compute="w4a4") - exact for one in (layer, plain))
    assert torch.equal(svdquant_linear(x, layer, compute="w16"), exact)
    assert torch.equal(
        svdquant_linear(x, layer, compute="w4a8" if format == "int4" else "w4a8-jit"),
        svdquant_linear(x, plain, compute="w4a8" if format == "int4" else "w4a8-jit"),
    )
    assert centred.norm() < 0.6 * stock.norm()


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_a_layer_for_8_bit_activations_gets_them(format):
    layer, wide = random_layer(format), random_layer(format, act_bits=8)
    x, mode = torch.randn(9, 256), choose(wide.spec, torch.device("cpu"), torch.float32).compute
    assert mode == ("w8a8" if cpu.exact() is None else {"int4": "w4a8", "nvfp4": "w4a8-jit"}[format])
    assert torch.equal(svdquant_linear(x, wide), svdquant_linear(x, layer, compute=mode))
    assert not torch.equal(svdquant_linear(x, wide), svdquant_linear(x, layer, compute="w4a4"))
    for arch in ("sm_75", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"):
        assert "w4a4" not in candidates(format, arch, "auto", 4096, act_bits=8)


@pytest.mark.parametrize("channels", [(0, 256), (64, 256), (64, 192)])
@pytest.mark.parametrize("compute", ["w4a4", "w16"])
def test_unsigned_channels(channels, compute):
    layer = random_layer("int4", act_unsigned=channels)
    x, bias = torch.nn.functional.gelu(torch.randn(9, 256), approximate="tanh"), torch.randn(96)
    wanted = formula(x, layer, bias, compute == "w4a4")
    assert (svdquant_linear(x, layer, bias, compute=compute) - wanted).norm() <= 2e-6 * wanted.norm()


def test_the_shift_cancels():
    """A layer with unsigned channels and shifted bias is the layer without them and the true bias."""
    shifted, plain = random_layer("int4", act_unsigned=(64, 256)), random_layer("int4")
    x, bias = torch.randn(9, 256).double(), torch.randn(96)
    term = shifted_bias_term(shifted.decode_weight(), shifted["smooth_factor"], (64, 256))
    y = svdquant_linear(x, shifted, bias - term, compute="w16")
    torch.testing.assert_close(y, svdquant_linear(x, plain, bias, compute="w16"), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shifted.unshifted_bias(bias - term), bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_dense_weight_is_the_layer_without_activation_rounding(format):
    layer, x = random_layer(format), torch.randn(5, 256)
    dense = torch.nn.functional.linear(x, layer.dense_weight())
    torch.testing.assert_close(svdquant_linear(x, layer, compute="w16"), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_lora_columns_add_their_product(format):
    layer, x = random_layer(format), torch.randn(5, 256)
    down, up = torch.randn(256, 7), torch.randn(96, 7)
    delta = svdquant_linear(x, layer, lora=(down, up)) - svdquant_linear(x, layer)
    torch.testing.assert_close(delta, x @ down @ up.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_empty_strided_and_poisoned_input(format):
    layer = random_layer(format)
    assert svdquant_linear(torch.zeros(0, 256), layer).shape == (0, 96)
    x = torch.randn(256, 6).T
    torch.testing.assert_close(svdquant_linear(x, layer), svdquant_linear(x.contiguous(), layer), rtol=1e-5, atol=1e-5)
    x = torch.randn(3, 256)
    x[1, 9] = float("nan")
    y = svdquant_linear(x, layer)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("x", "keywords", "message"),
    [
        (torch.zeros(2, 255), {}, r"needs \(\.\.\., 256\)"),
        (torch.zeros(2, 256, dtype=torch.int32), {}, "int32"),
        (torch.zeros(2, 256), {"bias": torch.zeros(95)}, r"needed \(96,\)"),
        (torch.zeros(2, 256), {"lora": (torch.zeros(255, 4), torch.zeros(96, 4))}, "do not fit"),
        (torch.zeros(2, 256), {"compute": "w3"}, "known are"),
        (torch.zeros(2, 256, device="meta"), {}, "move one of them"),
    ],
)
def test_bad_arguments_are_refused(x, keywords, message):
    with pytest.raises(ValueError, match=message):
        svdquant_linear(x, random_layer("int4"), **keywords)


@pytest.mark.parametrize("format", FORMATS)
def test_a_blob_holds_every_tensor(format):
    layer = random_layer(format, dtype=torch.bfloat16)
    blob, views = to_blob(layer.tensors, layer.spec.fmt.by_column)
    again = from_blob(blob, views)
    assert again.keys() == layer.tensors.keys()
    for name, tensor in layer.tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name].float(), tensor.float())
        assert (again[name].data_ptr() - blob.data_ptr()) % 256 == 0


def test_a_blob_holds_words_of_scales_where_the_format_reads_words():
    """K = 208 has 13 groups, four words of four: what the last one has beyond is zero."""
    layer = random_layer("nvfp4", k=208)
    blob, views = to_blob(layer.tensors, layer.spec.fmt.by_column)
    (view,) = (each for each in views if each.name == "wscales")
    scales = from_blob(blob, views)["wscales"]
    assert scales.shape == (13, layer.spec.n) and scales.stride() == (1, 16) and view.nbytes == 16 * layer.spec.n
    words = blob[view.offset : view.offset + view.nbytes].view(-1, 16)
    assert torch.equal(words[:, :13], layer["wscales"].view(torch.uint8).t()) and not words[:, 13:].any()


BROKEN = {  # what is changed in the tensors of a layer -> what the error says
    "missing": ("int4", lambda t: t.pop("wscales"), "wscales is missing"),
    "too few groups": ("int4", lambda t: t.update(wscales=t["wscales"][:1]), r"wscales has shape \(1, 96\).*\(4, 96\)"),
    "scales of one row": ("nvfp4", lambda t: t.update(wscales=t["wscales"][:1]), r"wscales has shape \(1, 96\)"),
    "zeros of one group": ("awq_w4a16", lambda t: t.update(wzeros=t["wzeros"][:1]), r"wzeros has shape \(1, 96\)"),
    "channel scale": ("nvfp4", lambda t: t.update(wcscales=torch.ones(1)), r"wcscales has shape \(1,\)"),
    "tensor scale": ("nvfp4", lambda t: t.update(wtscale=torch.ones(1)), r"wtscale has shape \(1,\).*needs \(\)"),
    "dtype": ("int4", lambda t: t.update(qweight=t["qweight"].int()), "qweight has dtype int32, needed int8"),
    "dtype of scales": ("int4", lambda t: t.update(wscales=t["wscales"].double()), "wscales has dtype float64"),
    "extra": ("int4", lambda t: t.update(wtscale=torch.ones(())), "wtscale is not a tensor of a int4 layer"),
    "rank": ("int4", lambda t: t.update(proj_up=t["proj_up"][:, :8]), r"proj_up has shape \(96, 8\)"),
    "smoothing": ("int4", lambda t: t.update(smooth_factor=t["smooth_factor"][:9]), r"smooth_factor has shape \(9,\)"),
    "one mean": ("int4", lambda t: t.update(act_mean=t["smooth_factor"]), "act_mean and out_mean belong together"),
    "device": ("int4", lambda t: t.update(wscales=t["wscales"].to("meta")), "wscales on meta: a layer lies on one"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_layer_is_valid_or_cannot_exist(name):
    format, change, message = BROKEN[name]
    layer = random_layer(format, rank=16 if FORMATS[format].low_rank else 0, dtype=torch.bfloat16)
    tensors = dict(layer.tensors)
    change(tensors)
    with pytest.raises(LayerError, match=message):
        Layer(layer.spec, tensors)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("int3", 96, 256), "format is 'int3', known are"),
        (("int4", 96, 250, 16), "K=250 is not a multiple of the int4 group of 64"),
        (("int4", -1, 256), "N=-1, K=256, rank 0: needed numbers that are not negative"),
        (("int4", 96, 256, -16), "rank -16: needed"),
        (("awq_w4a16", 96, 256, 16), "has no low-rank branch"),
        (("int4", 96, 256, 16, (32, 256)), "whole groups of 64"),
        (("int4", 96, 256, 16, (128, 64)), "whole groups of 64"),
        (("nvfp4", 96, 256, 16, (0, 64)), "unsigned channels 0:64 are not defined for nvfp4"),
        (("int4", 96, 256, 16, (0, 0), "four_six"), "'four_six' is unknown to int4"),
        (("int4", 96, 256, 16, (0, 0), "absmax", 6), "activations in 6 bit: int4 has 4 or 8"),
        (("awq_w4a16", 96, 256, 0, (0, 0), "absmax", 8), "awq_w4a16 has 16"),
    ],
)
def test_a_spec_that_contradicts_itself_cannot_be_made(fields, message):
    with pytest.raises(LayerError, match=message):
        LayerSpec(*fields)


@pytest.mark.parametrize(
    ("name", "value"), [("wscales", float("nan")), ("proj_up", float("inf")), ("smooth_factor", 0)]
)
def test_bad_values_are_named(name, value):
    tensors = dict(random_layer("int4", dtype=torch.bfloat16).tensors)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[3] = value
    with pytest.raises(LayerError, match=name):
        check_values(tensors)


def test_choose_gives_a_reason_for_everything_it_passes_over():
    choice = choose(LayerSpec("int4", 64, 64), torch.device("cpu"), torch.float32)
    assert (choice.backend.name, choice.compute) in (("cpu", "w8a8"), ("reference", "w4a4"))
    assert all(isinstance(reason, str) and reason for reason in choice.passed_over.values())
