"""Random 4-bit layers for tests."""

import torch

from svdquant_pack.kernels import FORMATS, Layer, LayerSpec


def random_layer(
    format: str,
    n: int = 96,
    k: int = 256,
    rank: int = 16,
    act_unsigned: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    """A layer of random weight, smoothing and branch; `dtype` is that of its 16-bit parts."""
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
    return Layer(LayerSpec(format, n, k, rank, act_unsigned), tensors)
