"""One stored layer of a Nunchaku file <-> the pack's tensors of a layer: tiles, padding, modulation rows.

Every size and dtype is checked from the header, before a byte of the layer is read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .....kernels.formats import SIXTEEN_BIT, Format
from .....kernels.layer import LayerError, LayerSpec, is_finite
from ... import tiles as layout
from ...spelling import formats_of
from ...tensor_file import TensorInfo

NAME = "nunchaku"
V1 = {"proj_down": "lora_down", "proj_up": "lora_up", "smooth_factor": "smooth", "smooth_factor_orig": "smooth_orig"}
V2 = {name: name for name in V1}
SUFFIXES = ("qweight", "wscales", "wzeros", "wtscale", "wcscales", "bias")
PARTS = {suffix: suffix for suffix in (*SUFFIXES, *V2)} | {v1: v2 for v2, v1 in V1.items()}
"""stored suffix -> our name, both generations of suffixes"""

IGNORED = "smooth_factor_orig"  # the calibrated value; no kernel reads it
AWQ_GROUP_TILE = 16  # packers pad the groups of a modulation layer to a multiple of this; the model's class does not
LOST_SCALES = 4  # groups that a writer loses which pads scales to 64 input channels and codes to 128


def scale_dtypes(fmt: Format) -> tuple[torch.dtype, ...]:
    """What the scales of a weight's groups may be: 16-bit floats, or E4M3, whose tiles are others."""
    return fmt.parts(fmt.group_size, 2 * fmt.group_size, 0)["wscales"].dtypes


def has_byte_scales(fmt: Format) -> bool:
    return torch.float8_e4m3fn in scale_dtypes(fmt)


def _format_of(infos: Mapping[str, TensorInfo]) -> Format:
    """The format whose tensors these are: with zeros, or by the dtype of the scales. Raises LayerError for none."""
    if "wscales" not in infos:
        raise LayerError("wscales is missing")
    with_branch = "wzeros" not in infos
    held = {fmt.name: fmt for fmt in formats_of(NAME).values() if fmt.low_rank == with_branch}
    dtype = infos["wscales"].dtype
    for fmt in held.values():
        if dtype in scale_dtypes(fmt) or not with_branch:
            return fmt
    needed = " or ".join(f"{', '.join(map(_name, scale_dtypes(fmt)[:2]))} ({name})" for name, fmt in held.items())
    raise LayerError(f"wscales has dtype {_name(dtype)}, needed {needed}")


@dataclass(frozen=True)
class StoredLayer:
    """What the header says of one stored layer.

    n, k         logical sizes, what remains of the padded ones
    padded       (N, K) as stored
    parts        our names of the tensors it has
    """

    name: str
    fmt: Format
    n: int
    k: int
    rank: int
    padded: tuple[int, int]
    parts: tuple[str, ...]

    @property
    def spec(self) -> LayerSpec:
        return LayerSpec(self.fmt.name, self.n, self.k, self.rank)


def up_to(size: int, multiple: int) -> int:
    return size + -size % multiple


def stored_size(infos: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """(N, K) as stored, from qweight. Raises LayerError for a foreign one."""
    if "qweight" not in infos:
        raise LayerError("qweight is missing")
    shape, dtype = infos["qweight"].shape, infos["qweight"].dtype
    if dtype == torch.int16:
        raise LayerError(
            "qweight is int16: a TinyChat AWQ layer of a text encoder, not of a diffusion model. "
            "Load a 16-bit or fp8 text encoder instead"
        )
    wanted = torch.int32 if "wzeros" in infos else torch.int8
    if dtype != wanted:
        raise LayerError(f"qweight has dtype {_name(dtype)}, needed {_name(wanted)}")
    if len(shape) != 2 or 0 in shape:
        raise LayerError(f"qweight has shape {shape}, needed two dimensions that are not empty")
    return (shape[0] * 4, shape[1] * 2) if wanted == torch.int32 else (shape[0], shape[1] * 2)


def inspect_layer(
    name: str, infos: Mapping[str, TensorInfo], n: int | None = None, k: int | None = None
) -> StoredLayer:
    """Check every tensor of a stored layer against each other and against the logical size (n, k) where it is known.

    infos   our name -> TensorInfo
    raises  LayerError saying what was found and what was needed
    """
    padded = stored_size(infos)
    n, k = n or padded[0], k or padded[1]
    if "wzeros" in infos:
        _check_sizes(padded, (n, k), (n, k))
        return _inspect_awq(name, infos, padded)
    if padded[0] % layout.TILE or padded[1] % layout.TILE:
        raise LayerError(f"is stored as {padded}, needed multiples of {layout.TILE}")
    _check_sizes(padded, (up_to(n, layout.TILE), up_to(k, layout.TILE)), (n, k))
    fmt, rank = _format_of(infos), _rank(infos)
    stored = StoredLayer(name, fmt, n, k, rank, padded, tuple(part for part in infos if part != IGNORED))
    group = fmt.group_size
    if k % group:
        raise LayerError(f"K={k} is not a multiple of the {fmt.name} group of {group} input channels")
    if has_byte_scales(fmt) and infos["wscales"].shape == (padded[1] // group - LOST_SCALES, padded[0]):
        raise LayerError(
            f"wscales covers {padded[1] - 64} of {padded[1]} input channels: its writer pads NVFP4 scales to 64 "
            "channels and codes to 128, and loses the rest. The file has to be quantized again"
        )
    _check_w4a4(infos, stored)
    return stored


def _check_sizes(padded: tuple[int, int], needed: tuple[int, int], logical: tuple[int, int]) -> None:
    if padded != needed:
        raise LayerError(f"is stored as (N, K) = {padded}, the model needs {logical}")


def _rank(infos: Mapping[str, TensorInfo]) -> int:
    if ("proj_down" in infos) != ("proj_up" in infos):
        raise LayerError(f"proj_{'up' if 'proj_down' in infos else 'down'} is missing")
    if "proj_down" not in infos:
        return 0
    shape, up = infos["proj_down"].shape, infos["proj_up"].shape
    if (0 in shape) != (0 in up):
        raise LayerError(f"proj_down has shape {shape} and proj_up {up}, needed numbers in both or none")
    if 0 in shape:
        return 0
    if len(shape) != 2 or shape[1] % layout.RANK_TILE:
        raise LayerError(f"proj_down has shape {shape}, needed (K, R) with R a multiple of {layout.RANK_TILE}")
    return shape[1]


def _check_w4a4(infos: Mapping[str, TensorInfo], stored: StoredLayer) -> None:
    n, k = stored.padded
    shapes: dict[str, list[tuple[int, ...]]] = {
        "qweight": [(n, k // 2)],
        "wscales": [(k // stored.fmt.group_size, n)],
        "smooth_factor": [(k,)],
        "bias": [(n,)],
    }
    declared = stored.fmt.parts(n, k, 0)
    if "wtscale" in declared:
        shapes["wtscale"] = [(1,), ()]
    if "wcscales" in declared:
        shapes["wcscales"] = [(n,)]
    if stored.rank:
        shapes |= {"proj_down": [(k, stored.rank)], "proj_up": [(n, stored.rank)]}
    if "smooth_factor" not in infos:
        raise LayerError("smooth (smooth_factor) is missing")
    _check_parts(infos, shapes, stored)


def _inspect_awq(name: str, infos: Mapping[str, TensorInfo], padded: tuple[int, int]) -> StoredLayer:
    (n, k), fmt = padded, _format_of(infos)
    if n % 4 or k % fmt.group_size:
        raise LayerError(f"is a W4A16 layer of (N, K) = {padded}, needed N a multiple of 4 and K of {fmt.group_size}")
    groups = k // fmt.group_size
    scales: list[tuple[int, ...]] = [(up_to(groups, AWQ_GROUP_TILE), n), (groups, n)]
    shapes: dict[str, list[tuple[int, ...]]] = {
        "qweight": [(n // 4, k // 2)],
        "wscales": scales,
        "wzeros": scales,
        "bias": [(n,)],
    }
    stored = StoredLayer(name, fmt, n, k, 0, padded, tuple(infos))
    _check_parts(infos, shapes, stored)
    return stored


def _check_parts(
    infos: Mapping[str, TensorInfo], shapes: Mapping[str, Sequence[tuple[int, ...]]], stored: StoredLayer
) -> None:
    found: set[torch.dtype] = set()
    for part, info in infos.items():
        if part == IGNORED or (part in ("proj_down", "proj_up") and not stored.rank):
            continue
        if part not in shapes:
            raise LayerError(f"{part} is not a tensor of a {stored.fmt.name} layer")
        if info.shape not in shapes[part]:
            raise LayerError(
                f"{part} has shape {info.shape}, {stored.fmt.name} at {stored.padded} needs {shapes[part][0]}"
            )
        if part == "qweight" or (part == "wscales" and has_byte_scales(stored.fmt)):
            continue
        if info.dtype not in SIXTEEN_BIT:
            raise LayerError(f"{part} has dtype {_name(info.dtype)}, needed bfloat16 or float16")
        found.add(info.dtype)
    if len(found - {torch.float32}) > 1:
        raise LayerError("mixes bfloat16 and float16 tensors; one of them was mislabelled")


Read = Callable[[str], torch.Tensor]
"""our name of a tensor -> the tensor as stored"""


def read_layer(stored: StoredLayer, read: Read, chunks: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a stored layer in natural order, cropped to its logical size. Inverse: `write_layer`.

    chunks  of a modulation layer whose rows are to be de-interleaved, else 0
    raises  LayerError when what would be cropped away is no padding
    """
    if not stored.fmt.low_rank:
        return _read_awq(stored, read, chunks)
    n, k, group = stored.n, stored.k, stored.fmt.group_size
    unpack_scales = layout.unpack_nvfp4_scales if has_byte_scales(stored.fmt) else layout.unpack_int4_scales
    qweight = layout.unpack_qweight(read("qweight"))
    wscales = unpack_scales(read("wscales"))
    tensors = {
        "qweight": qweight[:n, : k // 2],
        "wscales": wscales[: k // group, :n],
        "smooth_factor": layout.unpack_vector(read("smooth_factor"))[:k],
    }
    if stored.rank:
        tensors["proj_down"] = layout.unpack_proj_down(read("proj_down"))[:k]
        tensors["proj_up"] = layout.unpack_proj_up(read("proj_up"))[:n]
    if "wtscale" in stored.parts:
        tensors["wtscale"] = read("wtscale").reshape(())
    if "wcscales" in stored.parts:
        tensors["wcscales"] = layout.unpack_vector(read("wcscales"))[:n]
    if (n, k) != stored.padded:
        _check_padding(stored, qweight, wscales)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _check_padding(stored: StoredLayer, qweight: torch.Tensor, wscales: torch.Tensor) -> None:
    n, k, scales = stored.n, stored.k, wscales.float()
    codes_left = qweight[n:].any() or qweight[:, k // 2 :].any()
    scales_left = (scales[:, n:] != 1).any() or (scales[k // stored.fmt.group_size :] != 1).any()
    if codes_left or scales_left:
        raise LayerError(f"is stored as {stored.padded}; beyond ({n}, {k}) there are weights, needed padding")


def _read_awq(stored: StoredLayer, read: Read, chunks: int) -> dict[str, torch.Tensor]:
    """W = code * wscales + wzeros there, (code - 8) * wscales + wzeros here; fp32 where 16 bit would round the sum."""
    groups = stored.k // stored.fmt.group_size
    qweight, wscales, wzeros = layout.unpack_awq(read("qweight")), read("wscales")[:groups], read("wzeros")[:groups]
    exact = wzeros.float() + 8 * wscales.float()
    rounded = exact.to(wscales.dtype)
    wzeros = rounded if torch.equal(rounded.float(), exact) else exact
    if chunks:
        qweight = layout.deinterleave_rows(qweight, chunks)
        wscales, wzeros = (layout.deinterleave_rows(scales.T, chunks).T for scales in (wscales, wzeros))
    return {"qweight": qweight, "wscales": wscales.contiguous(), "wzeros": wzeros.contiguous()}


def read_bias(stored: StoredLayer, read: Read, chunks: int = 0) -> torch.Tensor:
    """The bias in natural order. Inverse: `write_bias`.

    Modulation layers come back in fp32, without the 1 that Nunchaku adds to the bias of their scales.
    """
    bias = read("bias")
    if stored.fmt.low_rank:
        return layout.unpack_vector(bias)[: stored.n].contiguous()
    return _add_to_scales(layout.deinterleave_rows(bias.float(), chunks), chunks, -1) if chunks else bias


def _add_to_scales(bias: torch.Tensor, chunks: int, value: int) -> torch.Tensor:
    bias = bias.clone().view(chunks, -1)
    for chunk in {1, chunks - 2}:  # shift, scale, gate[, shift, scale, gate]
        bias[chunk] += value
    return bias.view(-1)


def write_layer(
    tensors: Mapping[str, torch.Tensor], spec: LayerSpec, chunks: int = 0, group_tile: int = 1
) -> dict[str, torch.Tensor]:
    """The tensors of a layer as Nunchaku stores them, under our names. Inverse: `read_layer`.

    group_tile  of a modulation layer: its groups are padded to a multiple of it
    """
    if not spec.fmt.low_rank:
        return _write_awq(tensors, chunks, group_tile)
    n, k = up_to(spec.n, layout.TILE), up_to(spec.k, layout.TILE)
    pack_scales = layout.pack_nvfp4_scales if has_byte_scales(spec.fmt) else layout.pack_int4_scales
    smooth_factor = layout.pack_vector(_pad(tensors["smooth_factor"], k, fill=1))
    packed = {
        "qweight": layout.pack_qweight(_pad(tensors["qweight"], n, k // 2)),
        "wscales": pack_scales(_pad(tensors["wscales"], k // spec.fmt.group_size, n, fill=1)),
        "smooth_factor": smooth_factor,
        IGNORED: smooth_factor,
    }
    if "wtscale" in tensors:
        packed["wtscale"] = tensors["wtscale"].reshape(1)
    if "wcscales" in tensors:
        packed["wcscales"] = layout.pack_vector(_pad(tensors["wcscales"], n, fill=1))
    if spec.rank:
        rank = up_to(spec.rank, layout.RANK_TILE)
        packed["proj_down"] = layout.pack_proj_down(_pad(tensors["proj_down"], k, rank))
        packed["proj_up"] = layout.pack_proj_up(_pad(tensors["proj_up"], n, rank))
    return packed


def _write_awq(tensors: Mapping[str, torch.Tensor], chunks: int, group_tile: int) -> dict[str, torch.Tensor]:
    qweight, wscales = tensors["qweight"], tensors["wscales"]
    wzeros = (tensors["wzeros"].float() - 8 * wscales.float()).to(wscales.dtype)
    if not is_finite(wzeros):
        raise LayerError(f"has scales up to {wscales.abs().amax().item():.3g}, whose zeros are no 16-bit numbers there")
    wzeros = torch.where(wzeros == 0, -0.0, wzeros).to(wscales.dtype)  # as the packers write -zero_point * wscales
    if chunks:
        qweight = layout.interleave_rows(qweight, chunks)
        wscales, wzeros = (layout.interleave_rows(scales.T, chunks).T for scales in (wscales, wzeros))
    groups, n = up_to(len(wscales), group_tile), wscales.shape[1]
    return {
        "qweight": layout.pack_awq(qweight),
        "wscales": _pad(wscales, groups, n),
        "wzeros": _pad(wzeros, groups, n),
    }


def write_bias(bias: torch.Tensor, spec: LayerSpec, dtype: torch.dtype, chunks: int = 0) -> torch.Tensor:
    """A bias as Nunchaku stores it. Inverse: `read_bias`."""
    if spec.fmt.low_rank:
        return layout.pack_vector(_pad(bias.to(dtype), up_to(spec.n, layout.TILE), fill=1))
    if not chunks:
        return bias.to(dtype)
    return layout.interleave_rows(_add_to_scales(bias.float(), chunks, 1), chunks).to(dtype)


def _pad(tensor: torch.Tensor, *shape: int, fill: int = 0) -> torch.Tensor:
    if tuple(tensor.shape) == shape:
        return tensor.contiguous()
    padded = torch.full(shape, fill, dtype=tensor.dtype)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
