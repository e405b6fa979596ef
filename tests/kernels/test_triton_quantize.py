"""Triton's quantization kernels make the codes that kernels/stages.py defines."""

from itertools import product

import pytest
import torch

from svdquant_pack.kernels import stages
from svdquant_pack.kernels.formats.nvfp4 import from_e2m1
from svdquant_pack.kernels.layer import Lora
from svdquant_pack.kernels.packing import sign_extend, unpack
from svdquant_pack.kernels.stages import Coding
from svdquant_pack.tests.kernels.layers import settings_for

launch = pytest.importorskip("svdquant_pack.kernels.backends.triton.launch")
CODES = ("int4", "int8_group", "int8_row", "fp8_row", "nvfp4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def have(codes: str, device: torch.device) -> None:
    if device.type == "cuda" and codes in ("fp8_row", "nvfp4") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")


def numbers(qact: torch.Tensor, codes: str, unsigned: bool) -> torch.Tensor:
    """Codes as float32, one per channel."""
    if codes == "int4":
        return unpack(qact).float() if unsigned else sign_extend(unpack(qact)).float()
    return from_e2m1(unpack(qact)) if codes == "nvfp4" else qact.float()


def natural(ascales: torch.Tensor, k: int) -> torch.Tensor:
    """(K/group, M) float32: those of NVFP4 come as words of four groups"""
    scales = ascales.cpu().float()
    return scales if scales.dim() < 3 else scales.transpose(1, 2).flatten(0, 1)[: k // 16]


def compare(x, smooth, down, codes, channels, device):
    """Codes differ from the definition's in few places, by one step; scales and branch by their rounding."""
    have(codes, device)
    wanted = stages.quantize_activation(x, smooth, down, Coding(codes, channels))
    arguments = [None if tensor is None else tensor.to(device) for tensor in (x, smooth, down)]
    found = launch.quantize(*arguments, Coding(codes, channels))
    unsigned = channels[0] != channels[1]
    ours, theirs = (numbers(qact.cpu(), codes, unsigned) for qact in (found[0], wanted[0]))
    # the reciprocal of the smoothing is rounded, so a value on a tie may fall to the other side
    assert (ours != theirs).float().mean() <= 2e-3
    ascales = natural(found[1], x.shape[1])
    torch.testing.assert_close(ascales, wanted[1].float(), rtol=0.01, atol=0, equal_nan=True)
    if down is None:
        assert found[2] is None
    else:
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[x.dtype]
        torch.testing.assert_close(found[2].cpu(), wanted[2], rtol=tolerance, atol=tolerance, equal_nan=True)


def inputs(m: int, k: int, rank: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(m + k + rank)
    x = torch.randn(m, k, generator=generator) * torch.randn(k, generator=generator).exp()
    smooth = torch.rand(k, generator=generator) + 0.5
    down = torch.randn(k, rank, generator=generator) / k**0.5
    return x.to(dtype), smooth.to(dtype), down.to(dtype)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "rank"), [(1, 128, 16), (37, 192, 48), (530, 64, 32), (530, 64, 144)])
def test_codes_scales_and_branch(codes, dtype, m, k, rank, device):
    x, smooth, down = inputs(m, k, rank, dtype)
    compare(x, smooth, down, codes, (0, 0), device)


RANKS = [(0, 16), (32, 16), (32, 48), (16, 128), (48, 40), (160, 16), (128, 0)]  # 128 are made in the kernel
CLOSE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}


@pytest.mark.parametrize("rows", [33, 4096])
@pytest.mark.parametrize(
    ("codes", "dtype", "ranks"),
    [*product(("int4", "int8_row", "nvfp4"), DTYPES[:1], RANKS), *product(CODES, DTYPES[1:], [(48, 40)])],
)
def test_columns_of_a_lora_lie_beside_the_branch(codes, dtype, rows, ranks, device):
    """x itself times both factors, not what is rounded: that has its mean taken off and is smoothed."""
    have(codes, device)
    k, (rank, lora_rank) = 208 if codes == "nvfp4" else 192, ranks
    x, smooth, down = inputs(33, k, rank, dtype)
    mean = None if codes.endswith("_row") else torch.ones(k, dtype=dtype).to(device)
    lora_down = torch.randn(k, lora_rank).to(dtype)
    strength = torch.linspace(-1.5, 1.5, -(-lora_rank // 16))
    lora = Lora(lora_down.to(device), None, strength.to(device)) if lora_rank else None
    proj_down = down.to(device) if rank else None
    with settings_for(rows):
        act = launch.quantize(x.to(device), smooth.to(device), proj_down, Coding(codes), mean, lora)[2].cpu()
    wanted = x.double() @ torch.cat((down, lora_down), 1).double()
    wanted[:, rank:] *= strength.repeat_interleave(16)[:lora_rank]
    assert act.shape == wanted.shape and act.is_contiguous()
    torch.testing.assert_close(act.double(), wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype] * wanted.abs().max().item())


@pytest.mark.parametrize("rows", [33, 4096])
def test_a_lora_of_another_type_and_one_without_strength(rows, device):
    x, smooth, down = inputs(33, 128, 32, torch.bfloat16)
    lora_down = torch.randn(128, 32)
    wanted = x.float() @ torch.cat((down.float(), lora_down.bfloat16().float()), 1)
    for kind in (torch.float32, torch.bfloat16):
        lora = Lora(lora_down.to(device, kind), None)
        moved = [tensor.to(device) for tensor in (x, smooth, down)]
        with settings_for(rows):
            act = launch.quantize(*moved, Coding("int4"), lora=lora)[2].cpu().float()
        torch.testing.assert_close(act, wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item())


@pytest.mark.parametrize("codes", ["int4", "int8_group", "int8_row", "fp8_row"])
@pytest.mark.parametrize("channels", [(0, 192), (64, 192), (64, 128)])
def test_unsigned_channels_are_shifted(codes, channels, device):
    x, smooth, down = inputs(19, 192, 16, torch.bfloat16)
    x = torch.nn.functional.gelu(x.float(), approximate="tanh").bfloat16()
    if codes == "int4" and channels != (0, 192):  # codes of both kinds: compared as nibbles
        found = launch.quantize(x.to(device), smooth.to(device), None, Coding(codes, channels))[0].cpu()
        wanted = stages.quantize_activation(x, smooth, None, Coding(codes, channels))[0]
        assert (unpack(found) != unpack(wanted)).float().mean() <= 2e-3
    else:
        compare(x, smooth, down, codes, channels, device)


def test_values_below_the_shift_saturate_at_zero(device):
    x = torch.full((3, 64), -5.0)
    x[:, 0] = 2.0
    qact, _, _ = launch.quantize(x.to(device), None, None, Coding("int4", (0, 64)))
    assert unpack(qact.cpu())[:, 1:].eq(0).all() and unpack(qact.cpu())[:, 0].eq(15).all()


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_reach_the_scale(codes, bad, device):
    have(codes, device)
    x = torch.randn(5, 128)
    x[3, 70] = bad
    scales = natural(launch.quantize(x.to(device), None, None, Coding(codes))[1], 128)
    if codes in ("int8_row", "fp8_row"):
        assert scales.isnan().tolist() == [False, False, False, True, False]
    else:
        group = 70 // (128 // scales.shape[0])
        assert scales.isnan().nonzero().tolist() == [[group, 3]]


@pytest.mark.parametrize("codes", CODES)
def test_zeros_are_zeros(codes, device):
    have(codes, device)
    qact, scales, _ = launch.quantize(torch.zeros(3, 128, device=device), None, None, Coding(codes))
    assert numbers(qact.cpu(), codes, False).eq(0).all() and scales.cpu().float().eq(0).all()


@pytest.mark.parametrize("codes", CODES)
def test_no_rows_and_strided_rows(codes, device):
    have(codes, device)
    x, smooth, down = inputs(24, 128, 16, torch.float32)
    empty = launch.quantize(x[:0].to(device), smooth.to(device), down.to(device), Coding(codes))
    assert empty[0].shape[0] == 0 and empty[2].shape == (0, 16)
    wide = torch.cat((x, x), 1).to(device)
    for view in (wide[::3, :128], wide.t().contiguous().t()[::3, :128]):
        found = launch.quantize(view, smooth.to(device), down.to(device), Coding(codes))
        whole = launch.quantize(x[::3].to(device), smooth.to(device), down.to(device), Coding(codes))
        for one, other in zip(found, whole, strict=True):
            assert torch.equal(one.cpu().float(), other.cpu().float())


@pytest.mark.parametrize("codes", ["int4", "nvfp4", "int8_group"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_taken_off(codes, dtype, device):
    """From what is rounded to 4 bit, not from the branch."""
    have(codes, device)
    x, smooth, down = inputs(530, 192, 16, dtype)
    mean = (3 * torch.randn(192)).to(dtype)
    x = (x.float() + mean).to(dtype)
    channels = (0, 0) if codes == "nvfp4" else (64, 128)
    wanted = stages.quantize_activation(
        x, smooth, down, Coding(codes, channels), act_mean=None if "8" in codes else mean
    )
    moved = [tensor.to(device) for tensor in (x, smooth, down)]
    found = launch.quantize(*moved, Coding(codes, channels), act_mean=mean.to(device))
    if codes == "int8_group":
        assert (found[0].cpu() != wanted[0]).float().mean() <= 2e-3
    else:
        assert (unpack(found[0].cpu()) != unpack(wanted[0])).float().mean() <= 3e-3
    ascales = natural(found[1], 192)
    torch.testing.assert_close(ascales, wanted[1].float(), rtol=0.13, atol=0)
    assert (ascales != wanted[1].float()).float().mean() <= (0.01 if dtype != torch.float32 else 1)
    torch.testing.assert_close(found[2].cpu().float(), wanted[2].float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize(("codes", "rule"), [("int4", "signed_extreme"), ("nvfp4", "four_six")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [(0, 0), (64, 128)])
def test_other_rules_for_the_scale(codes, rule, dtype, channels, device):
    have(codes, device)
    if codes == "nvfp4" and channels != (0, 0):
        channels = (0, 0)
    x, smooth, _ = inputs(40, 192, 16, dtype)
    x[1] = -x[0]
    x[2, 5], x[2, 6] = 50, -50  # both signs of the extreme
    x[3] = 0
    wanted = stages.quantize_activation(x, smooth, None, Coding(codes, channels, rule))
    found = launch.quantize(x.to(device), smooth.to(device), None, Coding(codes, channels, rule))
    assert (unpack(found[0].cpu()) != unpack(wanted[0])).float().mean() <= 3e-3
    ascales = natural(found[1], 192)
    differ = (ascales != wanted[1].float()).float().mean()
    assert differ <= (0.01 if dtype != torch.float32 else 1)
    torch.testing.assert_close(ascales, wanted[1].float(), rtol=0.51, atol=0)


@pytest.mark.parametrize("chunks", [True, False])
def test_the_last_word_of_nvfp4_scales_is_zero_beyond_k(chunks, device):
    have("nvfp4", device)
    x, smooth, down = inputs(37 if chunks else 530, 208, 16, torch.bfloat16)
    compare(x, smooth, down, "nvfp4", (0, 0), device)
    ascales = launch.quantize(x.to(device), smooth.to(device), None, Coding("nvfp4"))[1].cpu().float()
    assert ascales.shape == (4, x.shape[0], 4) and not ascales[3, :, 1:].any() and ascales[3, :, 0].all()
