"""Random 4-bit layers for tests."""

import torch

from svdquant_pack.kernels import FORMATS, Layer, LayerSpec, stages
from svdquant_pack.kernels.layer import mean_term


def random_layer(
    format: str,
    n: int = 96,
    k: int = 256,
    rank: int = 16,
    act_unsigned: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    centred: bool = False,
    act_bits: int = 4,
) -> Layer:
    """A layer of random weight, smoothing and branch; `dtype` is that of its 16-bit parts.

    centred  with means of signed channels that are a few times the spread of a normal activation
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    fmt = FORMATS[format]
    tensors = fmt.encode_weight(normal(n, k) / k**0.5, dtype)
    if not fmt.low_rank:
        return Layer(LayerSpec(format, n, k), tensors)
    tensors["smooth_factor"] = (normal(k) * 0.5).exp().to(dtype)
    if rank:
        tensors["proj_down"] = (normal(k, rank) / k**0.5).to(dtype)
        tensors["proj_up"] = (normal(n, rank) / rank**0.5).to(dtype)
    if centred:
        mean = 3 * normal(k)
        mean[slice(*act_unsigned)] = 0
        tensors["act_mean"] = mean.to(dtype)
        tensors["out_mean"] = mean_term(fmt.decode_weight(tensors), tensors["smooth_factor"], tensors["act_mean"])
    return Layer(LayerSpec(format, n, k, rank, act_unsigned, act_bits=act_bits), tensors)


class RowSteps:
    """The steps before a product of int8 rows, by their definition."""

    @staticmethod
    def quantized(x: torch.Tensor, layer: Layer, codes: str) -> tuple[torch.Tensor, ...]:
        tensors = layer.tensors
        coding = stages.Coding(codes, layer.spec.act_unsigned)
        return stages.quantize_activation(x, tensors["smooth_factor"], tensors.get("proj_down"), coding)

    @staticmethod
    def expanded(layer: Layer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.spec.fmt.expand_rows(layer.tensors, dtype)
