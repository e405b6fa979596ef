"""Triton's matrix products against float64, for every flag of the epilogue."""

import pytest
import torch

from svdquant_pack.kernels import FORMATS, eight_bit, stages
from svdquant_pack.kernels.packing import by_column, pack, unpack
from svdquant_pack.kernels.stages import CodedActivation, Coding

launch = pytest.importorskip("svdquant_pack.kernels.backends.triton.launch")
from svdquant_pack.kernels.backends.triton.launch import Epilogue  # noqa: E402 (only where Triton is)

ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}  # of y to its dtype; sums add less
DTYPES = tuple(ROUNDING)
M, N, K, R = 45, 192, 256, 48


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(epilogue: Epilogue, device: torch.device) -> Epilogue:
    parts = {
        name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in epilogue._asdict().items()
    }
    return Epilogue(**parts)


def finished(product: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """The epilogue in float64."""
    y = product.double()
    ups = [up.double() for up in (epilogue.proj_up, epilogue.lora_up) if up is not None]
    if ups:
        y = y + epilogue.act.double() @ torch.cat(ups, 1).T
    if epilogue.bias is not None:
        y = y + epilogue.bias.double()
    return stages.activate(y, epilogue.activation)


def make_epilogue(dtype: torch.dtype, kind: str, m: int = M) -> Epilogue:
    act, lora_act = normal(m, R, seed=1).to(dtype), normal(m, 40, seed=3).to(dtype)
    proj_up, lora_up = ((normal(N, rank, seed=2) / 8).to(dtype) for rank in (R, 40))
    bias = normal(N, seed=5).to(dtype)
    return {
        "nothing": Epilogue(),
        "bias": Epilogue(bias=bias),
        "branch": Epilogue(act, proj_up),
        "lora": Epilogue(lora_act, lora_up=lora_up, bias=bias),
        "both": Epilogue(torch.cat((act, lora_act), 1), proj_up, lora_up, bias),
        "gelu": Epilogue(act, proj_up, bias=bias, activation="gelu"),
        "silu": Epilogue(act, proj_up, bias=bias, activation="silu"),
    }[kind]


KINDS = ("nothing", "bias", "branch", "lora", "both", "gelu", "silu")


def check(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    error = (found.cpu().double() - wanted).norm() / wanted.norm()
    assert error <= ROUNDING[dtype], f"relative error {error:.2e}"


def int4_weight(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weight = FORMATS["int4"].encode_weight(normal(N, K, seed=6) / 16, dtype)
    codes = unpack(weight["qweight"])
    codes[::3, ::5] = 8  # -8, which a recipe may use
    weight["wscales"][1] *= -1  # and so are negative scales
    return {**weight, "qweight": pack(codes)}


def int4_case(codes: str, channels: tuple[int, int], dtype: torch.dtype, m: int = M):
    weight = int4_weight(dtype)
    x = normal(m, K, seed=7).to(dtype)
    qact, ascales, _ = stages.quantize_activation(x, None, None, Coding(codes, channels))
    if codes == "int4":
        act = FORMATS["int4"].decode_activation(unpack(qact), ascales.T, channels)
    else:
        act, channels = eight_bit.decode_groups(qact, ascales), (0, 0)
    return weight, qact, ascales, channels, act.double() @ FORMATS["int4"].decode_weight(weight).double().T


def multiply_w4(case, epilogue, dtype, device, next_smooth=None):
    weight, qact, ascales, channels, _ = case
    act = CodedActivation(qact.to(device), ascales.to(device))
    weight = {name: tensor.to(device) for name, tensor in weight.items()}
    smooth = None if next_smooth is None else next_smooth.to(device)
    return launch.multiply_w4(act, weight, moved(epilogue, device), channels, dtype, smooth)


@pytest.mark.parametrize("codes", ["int4", "int8_group"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_int4_weight(codes, dtype, kind, device):
    case, epilogue = int4_case(codes, (0, 0), dtype), make_epilogue(dtype, kind)
    (y,) = multiply_w4(case, epilogue, dtype, device)
    check(y, finished(case[-1], epilogue), dtype)


@pytest.mark.parametrize("channels", [(0, K), (64, K), (64, 128)])
@pytest.mark.parametrize("codes", ["int4", "int8_group"])
def test_int4_weight_with_unsigned_channels(codes, channels, device):
    case = int4_case(codes, channels, torch.float16)
    (y,) = multiply_w4(case, Epilogue(), torch.float16, device)
    check(y, case[-1], torch.float16)


@pytest.mark.parametrize("m", [1, 16, 63, 64, 65, 257])
def test_odd_row_counts(m, device):
    case = int4_case("int8_group", (0, 0), torch.bfloat16, m)
    epilogue = make_epilogue(torch.bfloat16, "branch", m)
    check(multiply_w4(case, epilogue, torch.bfloat16, device)[0], finished(case[-1], epilogue), torch.bfloat16)


@pytest.mark.parametrize("codes", ["int4", "int8_group"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [45, 130])
def test_requantized_bytes_are_those_of_the_next_layer(codes, dtype, m, device):
    case, epilogue = int4_case(codes, (0, 0), dtype, m), make_epilogue(dtype, "gelu", m)
    smooth = (torch.rand(N, generator=torch.Generator().manual_seed(8)) + 0.5).to(dtype)
    y, qact, ascales = (tensor.cpu() for tensor in multiply_w4(case, epilogue, dtype, device, smooth))
    check(y, finished(case[-1], epilogue), dtype)
    wanted, scales, _ = stages.quantize_activation(y, smooth, None, Coding("int4", (0, N)))
    assert (unpack(qact) != unpack(wanted)).float().mean() <= 1e-3
    torch.testing.assert_close(ascales.float(), scales.float(), rtol=0.01, atol=0)


@pytest.mark.parametrize("rank", [16, 160, 512])
def test_wide_branches_are_summed_in_slices(rank, device):
    case = int4_case("int8_group", (0, 0), torch.float32)
    epilogue = Epilogue(normal(M, rank, seed=9), normal(N, rank, seed=10) / rank**0.5)
    (y,) = multiply_w4(case, epilogue, torch.float32, device)
    check(y, finished(case[-1], epilogue), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [K, 192])
def test_int8_rows(dtype, kind, k, device):
    x, weight = normal(M, k, seed=11), normal(N, k, seed=12)
    qact, ascales = eight_bit.quantize_rows(x)
    codes, row_scales = eight_bit.quantize_rows(weight)
    epilogue = make_epilogue(dtype, kind)
    act = CodedActivation(qact.to(device), ascales.to(device))
    y = launch.multiply_w8(act, codes.to(device), row_scales.to(device), moved(epilogue, device), dtype)
    exact = torch._int_mm(qact, codes.t()) if M > 16 else qact.int() @ codes.int().T
    check(y, finished(exact.double() * ascales.double()[:, None] * row_scales.double(), epilogue), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "order"), [(K, "packed"), (208, "packed"), (208, "natural")])
def test_nvfp4(dtype, kind, k, order, device):
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] not in (10, 12):
        pytest.skip("this GPU has no NVFP4 tensor cores")
    fmt = FORMATS["nvfp4"]
    weight = fmt.encode_weight(normal(N, k, seed=13), dtype) | {"wcscales": normal(N, seed=14).abs()}
    nibbles, scales = fmt.quantize_activation(normal(M, k, seed=15))
    product = fmt.decode_activation(nibbles, scales).double() @ fmt.decode_weight(weight).double().T
    epilogue = make_epilogue(dtype, kind)
    weight = {name: tensor.to(device) for name, tensor in weight.items()}
    words = by_column(scales.T, 4).view(M, -1, 4).transpose(0, 1).contiguous()  # four groups of a row each
    act = CodedActivation(pack(nibbles).to(device), words.to(device))
    if order == "packed":
        weight |= {"wscales": by_column(weight["wscales"], 4)[:, : k // 16].t()}
    y = launch.multiply_nvfp4(act, weight, moved(epilogue, device), dtype)
    check(y, finished(product, epilogue), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 17])
def test_gemv_w4a16(dtype, m, device):
    fmt = FORMATS["awq_w4a16"]
    weight, x, bias = fmt.encode_weight(normal(N, K, seed=16), dtype), normal(m, K, seed=17).to(dtype), normal(N)
    product = x.double() @ fmt.decode_weight(weight).double().T
    parts = [weight[name].to(device) for name in ("qweight", "wscales", "wzeros")]
    check(launch.multiply_gemv(x.to(device), *parts, None), product, dtype)
    check(launch.multiply_gemv(x.to(device), *parts, bias.to(dtype).to(device)), product + bias.to(dtype), dtype)


def test_no_rows(device):
    case = int4_case("int8_group", (0, 0), torch.float32, 0)
    assert multiply_w4(case, Epilogue(), torch.float32, device)[0].shape == (0, N)


def test_nan_reaches_its_row_alone(device):
    weight, qact, ascales, channels, product = int4_case("int8_group", (0, 0), torch.float32)
    ascales[1, 7] = torch.nan
    (y,) = multiply_w4((weight, qact, ascales, channels, product), Epilogue(), torch.float32, device)
    assert y.cpu().isnan().all(1).nonzero().flatten().tolist() == [7]
    assert y.cpu().isnan().any(1).sum() == 1
