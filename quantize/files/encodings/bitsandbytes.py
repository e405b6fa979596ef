"""bitsandbytes' 4-bit weights, NF4 and FP4: code book times the largest magnitude of each block, in fp32.

    W.flatten()[i] = dtype(quant_map[code[i]] * absmax[i // blocksize])
    absmax[j]      = nested_quant_map[absmax_code[j]] * nested_absmax[j // nested_blocksize] + nested_offset,
                     where absmax itself is stored in 8 bits

X.weight holds two codes per byte, the first in the upper half. Beside it X.weight.absmax, X.weight.quant_map,
X.weight.nested_absmax, X.weight.nested_quant_map and X.weight.quant_state.bitsandbytes__nf4 (or fp4), UTF-8 JSON.
Source: bitsandbytes' `dequantize_4bit`, whose numbers these are, bit by bit.
"""

import math
from typing import Any

import torch

from ....kernels.bounded_json import MARKER, JsonError, Kind, read_object
from ..tensor_file import TensorFile, TensorFileError, TensorInfo
from ..tensors import TensorView

STATES = tuple(f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
KINDS: dict[str, Kind] = {
    "blocksize": int,
    "dtype": str,
    "shape": list,
    "nested_blocksize": int,
    "nested_offset": (int, float),
}


def decode(file: TensorFile) -> TensorFile:
    """Raises TensorFileError for a weight whose parts do not fit each other."""
    states = {key.removesuffix(end): key for key in file for end in STATES if key.endswith(end)}
    if not states:
        return file
    found = {weight: _state(file, weight, key) for weight, key in states.items()}
    described = {*states.values(), *(f"{weight}.{part}" for weight in found for part in PARTS)}
    infos = {
        key: TensorInfo(tuple(found[key]["shape"]), DTYPES[found[key]["dtype"]]) if key in found else info
        for key, info in file.infos.items()
        if key not in described
    }

    def read(key: str) -> torch.Tensor:
        return _weight(file, key, found[key]) if key in found else file.read(key)

    return TensorView(file.path, infos, read, file.metadata)


def _state(file: TensorFile, weight: str, key: str) -> dict[str, Any]:
    """The JSON of one weight, checked with the tensors beside it."""
    try:
        info = file.infos[key]
        if info.dtype != torch.uint8 or info.nbytes > MARKER.size:
            raise JsonError(f"it has {info.nbytes:,} bytes, at most {MARKER.size:,} are read")
        state = read_object(bytes(file.read(key).flatten().numpy()), key, KINDS, MARKER)
    except JsonError as error:
        raise TensorFileError(f"{file.path.name}: {key} cannot be read: {error}") from error
    if problem := _problem(file, weight, state):
        raise TensorFileError(f"{file.path.name}: {weight}, in 4 bits of bitsandbytes: {problem}. The file is damaged")
    return state


def _problem(file: TensorFile, weight: str, state: dict[str, Any]) -> str | None:
    shape, block = state.get("shape", []), state.get("blocksize", 0)
    if not shape or not all(isinstance(size, int) and 0 < size < 1 << 32 for size in shape):
        return f"its shape is {shape!r:.80}"
    if state.get("dtype") not in DTYPES:
        return f"its dtype is {state.get('dtype')!r:.80}, needed one of {', '.join(DTYPES)}"
    blocks = -(-math.prod(shape) // block) if block > 0 else 0
    needed = {"": (math.prod(shape) + 1) // 2, ".absmax": blocks, ".quant_map": 16}
    if file.infos.get(f"{weight}.absmax", TensorInfo((), torch.float32)).dtype == torch.uint8:
        nested = state.get("nested_blocksize", 0)
        needed |= {".nested_absmax": -(-blocks // nested) if nested > 0 else 0, ".nested_quant_map": 256}
        if "nested_offset" not in state:
            return "nested_offset is missing"
    for part, count in needed.items():
        info = file.infos.get(f"{weight}{part}")
        kind = torch.uint8 if part == "" or (part == ".absmax" and ".nested_absmax" in needed) else torch.float32
        if info is None or info.dtype != kind or math.prod(info.shape) != count or count == 0:
            given = "is missing" if info is None else f"has shape {info.shape} and dtype {info.dtype}"
            return f"{part.removeprefix('.') or 'the codes'} {given}, needed {count} of {kind}"
    return None


def _weight(file: TensorFile, weight: str, state: dict[str, Any]) -> torch.Tensor:
    scale = file.read(f"{weight}.absmax").flatten()
    if scale.dtype == torch.uint8:
        book = file.read(f"{weight}.nested_quant_map").flatten()
        scale = _scaled(book[scale.long()], file.read(f"{weight}.nested_absmax").flatten(), state["nested_blocksize"])
        scale = scale + state["nested_offset"]
    packed = file.read(weight).flatten()
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[: math.prod(state["shape"])]
    values = file.read(f"{weight}.quant_map").flatten()[codes.int()]
    return _scaled(values, scale, state["blocksize"]).to(DTYPES[state["dtype"]]).reshape(state["shape"])


def _scaled(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """One scale for each run of `block` values; the last run may be shorter."""
    whole = values.numel() // block * block
    head = values[:whole].view(-1, block) * scales[: whole // block, None]
    return torch.cat((head.flatten(), values[whole:] * scales[-1]))
