"""Is a backend right on this device? A small layer, against the reference on the CPU."""

import torch

from .backends import Backend, KernelCall
from .formats import FORMATS
from .layer import Layer, LayerSpec, mean_term

SHAPES = ((5, 192), (600, 256))  # (M, N): kernels have settings for few rows and for many, for ragged N and even N
K, RANK = 256, 32
# relative error of a whole layer: rounding to 16 bit gives 0.004, codes that fall on the other side of a tie less;
# a wrong scale, nibble or sign gives more than 0.1
TOLERANCE = 0.02


def make_layer(format: str, dtype: torch.dtype, n: int, partly_unsigned: bool) -> Layer:
    """A layer of random numbers, the same each time."""
    fmt, generator = FORMATS[format], torch.Generator().manual_seed(0)
    tensors = dict(fmt.encode_weight(torch.randn(n, K, generator=generator) / K**0.5, dtype))
    rank = RANK if fmt.low_rank else 0
    if fmt.low_rank:
        tensors["smooth_factor"] = (torch.rand(K, generator=generator) + 0.5).to(dtype)
        tensors["proj_down"] = (torch.randn(K, rank, generator=generator) / K**0.5).to(dtype)
        tensors["proj_up"] = (torch.randn(n, rank, generator=generator) / rank**0.5).to(dtype)
    if fmt.low_rank and n == SHAPES[1][1]:
        tensors["act_mean"] = (torch.randn(K, generator=generator) / 4).to(dtype)
        tensors["out_mean"] = mean_term(fmt.decode_weight(tensors), tensors["smooth_factor"], tensors["act_mean"])
    unsigned = (64, 128) if partly_unsigned else (0, K) if fmt.unsigned_act and n == SHAPES[0][1] else (0, 0)
    return Layer(LayerSpec(format, n, K, rank, unsigned), tensors)


def self_test(backend: Backend, call: KernelCall) -> str | None:
    """What is wrong with `backend` for such calls, or None."""
    from .backends.reference import linear

    generator = torch.Generator().manual_seed(1)
    try:
        for rows, n in SHAPES:
            layer = make_layer(call.format, call.dtype, n, call.partly_unsigned)
            there = layer.to(call.device)
            bias = torch.randn(n, generator=generator).to(call.dtype)
            x = torch.randn(rows, K, generator=generator).to(call.dtype)
            wanted = linear(x, layer, bias, None, call.compute).float()
            found = backend.linear(x.to(call.device), there, bias.to(call.device), None, call.compute).cpu().float()
            error = ((found - wanted).norm() / wanted.norm()).item()
            if not error <= TOLERANCE:
                return f"its self-test is wrong by {error:.3g} of the result, allowed are {TOLERANCE}"
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler or driver fault has any type
        return f"its self-test failed with {type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
