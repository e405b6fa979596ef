"""Random 4-bit layers for tests."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from svdquant_pack.kernels import FORMATS, Layer, LayerSpec, stages
from svdquant_pack.kernels.layer import Lora, mean_term


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


def quantized(
    x: torch.Tensor, layer: Layer, codes: str, lora: Lora | None
) -> tuple[stages.CodedActivation, torch.Tensor | None]:
    """(x in codes, x @ [proj_down | lora.down * strength]) as a backend's quantizer has them, by their definition"""
    tensors, spec = layer.tensors, layer.spec
    coding = stages.Coding(codes, spec.act_unsigned, spec.act_rule)
    mean = tensors.get("act_mean") if codes == spec.format else None
    *coded, act = stages.quantize_activation(x, tensors["smooth_factor"], tensors.get("proj_down"), coding, mean)
    if lora is not None:
        mine = stages.weighted((x.float() @ lora.down.float()), lora.strength)
        act = torch.cat((act, mine.to(x.dtype)), 1)
    return stages.CodedActivation(*coded), act if act.shape[1] else None


@contextlib.contextmanager
def settings_for(rows: int) -> Iterator[None]:
    """Inside, Triton quantizes few rows with the settings that it has for so many."""
    from svdquant_pack.kernels.backends.triton import tiles

    names = ("quantize_groups", "quantize_nvfp4", "quantize_rows")
    chosen = {(name, tiles.entry(name, "", 1)): tiles.as_shipped(name, tiles.entry(name, "", rows)) for name in names}
    with tiles.trying(chosen):
        yield


class RowSteps:
    """The steps before a product of int8 rows, by their definition."""

    @staticmethod
    def quantizer(x: torch.Tensor, layer: Layer, codes: str, lora: Lora | None) -> Callable[..., Any]:
        return lambda x, layer, lora: quantized(x, layer, codes, lora)

    @staticmethod
    def expander(layer: Layer, dtype: torch.dtype) -> Callable[[Layer], Any]:
        return lambda layer: layer.spec.fmt.expand_rows(layer.tensors, dtype)
