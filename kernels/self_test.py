"""Is a backend right on this device? A small layer, against the reference on the CPU."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from .backends import Backend, KernelCall
from .formats import GROUP_SIZE
from .layer import RANK_TILE, Layer, LayerSpec, Lora, mean_term

# (M, N, with means): kernels have settings for few rows and for many, for ragged N and even N
SHAPES = ((5, 192, False), (600, 256, True))
K, RANK = 256, 32
LORAS = RANK_TILE, 4 * RANK_TILE  # ranks: beside a branch of 32, wide ones are another kernel's
TILE = 256  # no kernel's tile is larger: what a size leaves over of it decides between kernels, the rest does not
# relative error of a whole layer: rounding to 16 bit gives 0.004, codes that fall on the other side of a tie less;
# a wrong scale, nibble or sign gives more than 0.1
TOLERANCE = 0.02


class Sample(NamedTuple):
    """A small layer that the same kernels run as the layers it stands for.

    kinds   {name of a tensor: its dtype}, as pairs
    biased  whether calls come with a bias
    """

    spec: LayerSpec
    kinds: tuple[tuple[str, torch.dtype], ...]
    biased: bool


def sample_of(spec: LayerSpec, kinds: Mapping[str, torch.dtype], biased: bool) -> Sample:
    """The sample that stands for a layer with tensors of these types.

    >>> linear1 = LayerSpec("int4", n=21504, k=3072, rank=32)
    >>> sample = sample_of(linear1, {"qweight": torch.int8}, biased=True)
    >>> sample.spec.where, sample == sample_of(LayerSpec("int4", 3072, 12288, 32), {"qweight": torch.int8}, True)
    ('int4 at N=256, K=256, rank 32', True)
    """
    n, k = (TILE + size % TILE for size in (spec.n, spec.k))
    unsigned = (GROUP_SIZE, 2 * GROUP_SIZE) if spec.partly_unsigned else (0, k) if any(spec.act_unsigned) else (0, 0)
    return Sample(replace(spec, n=n, k=k, act_unsigned=unsigned), tuple(sorted(kinds.items(), key=str)), biased)


def samples(call: KernelCall) -> list[tuple[int, Sample]]:
    """(M, sample) for calls of layers of which nothing else is known."""
    fmt, found = call.fmt, []
    for rows, n, means in SHAPES:
        unsigned = (GROUP_SIZE, 2 * GROUP_SIZE) if call.partly_unsigned else (0, 0)
        if fmt.unsigned_act and not means and not call.partly_unsigned:
            unsigned = (0, K)
        spec = LayerSpec(call.format, n, K, RANK if fmt.low_rank else 0, unsigned)
        kinds = {name: part.dtypes for name, part in fmt.parts(n, K, spec.rank).items() if not part.optional}
        kinds |= {"act_mean": (call.dtype,), "out_mean": (torch.float32,)} if means and fmt.low_rank else {}
        chosen = {name: call.dtype if call.dtype in able else able[0] for name, able in kinds.items()}
        stored = fmt.encode_weight(torch.zeros(1, fmt.group_size), call.dtype)  # it may have optional ones
        found.append((rows, Sample(spec, tuple((chosen | _kinds(stored)).items()), True)))
    return found


def _kinds(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


def make_layer(sample: Sample) -> Layer:
    """A layer of random numbers, the same each time."""
    spec, kinds, generator = sample.spec, dict(sample.kinds), torch.Generator().manual_seed(0)
    n, k, rank, fmt = spec.n, spec.k, spec.rank, spec.fmt

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    scales = kinds.get("wscales", torch.float32)
    tensors = dict(fmt.encode_weight(normal(n, k) / k**0.5, scales if scales.itemsize > 1 else torch.float32))
    others = {
        "smooth_factor": lambda: torch.rand(k, generator=generator) + 0.5,
        "proj_down": lambda: normal(k, rank) / k**0.5,
        "proj_up": lambda: normal(n, rank) / max(rank, 1) ** 0.5,
        "act_mean": lambda: normal(k) / 4,
        "wcscales": lambda: torch.rand(n, generator=generator) + 0.5,
    }
    tensors |= {name: make() for name, make in others.items() if name in kinds}
    tensors = {name: tensor.to(kinds[name]) for name, tensor in tensors.items() if name in kinds}
    if "out_mean" in kinds:
        tensors["out_mean"] = mean_term(fmt.decode_weight(tensors), tensors["smooth_factor"], tensors["act_mean"])
    return Layer(spec, tensors)


def self_test(backend: Backend, call: KernelCall, tested: Sequence[tuple[int, Sample]] = ()) -> str | None:
    """What is wrong with `backend` for such calls, or None: on `tested`, (M, sample), else on `samples`

    Each is run as it is and with LoRAs: what a first one would find out later is found out here.
    """
    from .backends.reference import linear as reference

    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(call.dtype)

    try:
        for rows, sample in tested or samples(call):
            layer, (n, k) = make_layer(sample), (sample.spec.n, sample.spec.k)
            there = layer.to(call.device).in_order(backend.order(sample.spec, call.compute))
            x, bias = normal(rows, k), normal(n) if sample.biased else None
            loras: list[Lora | None] = [None]
            if sample.spec.fmt.low_rank:
                for rank in LORAS:
                    strength = torch.full((rank // RANK_TILE,), 0.5)
                    loras.append(Lora(normal(k, rank) / k**0.5, normal(n, rank) / rank**0.5, strength))
            for lora in loras:
                wanted = reference(x, layer, bias, lora, call.compute).float()
                beside = None if lora is None else Lora(*(part.to(call.device) for part in lora if part is not None))
                bias_there = None if bias is None else bias.to(call.device)
                found = backend.linear(x.to(call.device), there, bias_there, beside, call.compute).cpu().float()
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
