"""What stays in 16 bit: linears that are not quantized, biases of 4-bit layers, norms and other tensors."""

from collections.abc import Sequence

import torch

from .....kernels.layer import LayerError
from ...tensor_file import TensorInfo
from .assign import Placement
from .layers import StoredLayer, read_bias
from .stored_file import Draft, Reader
from .tables import LinearRow, StoredName


def bind_sizes(draft: Draft, linears: Sequence[Placement]) -> None:
    """Learn h and mlp from linears that are stored without padding."""
    for placement in linears:
        parts = placement.linear.spellings[placement.spelling]
        for name, part in zip(placement.stored, parts, strict=True):
            info = draft.stored.plain.get(name, {}).get("weight")
            if info is not None and len(info.shape) == 2:
                draft.sizes.bind(part.n, info.shape[0])
                draft.sizes.bind(part.k, info.shape[1])


def add_linear(draft: Draft, placement: Placement) -> None:
    """A linear in 16 bit under ComfyUI's names: weights joined or split like 4-bit ones. Raises LayerError."""
    linear, parts = placement.linear, placement.linear.spellings[placement.spelling]
    if placement.apart:
        for host, name, part in zip(placement.hosts, placement.stored, parts, strict=True):
            _add_parts(draft, (host,), (name,), (part,), linear)
    else:
        _add_parts(draft, placement.hosts, placement.stored, parts, linear)


def _add_parts(
    draft: Draft, hosts: tuple[str, ...], names: tuple[str, ...], parts: Sequence[StoredName], linear: LinearRow
) -> None:
    modules = [draft.stored.plain[name] for name in names]
    for name, module, part in zip(names, modules, parts, strict=True):
        _check_module(draft, name, module, part, linear)
    dim = 1 if linear.join == "columns" else 0
    weights = [(f"{name}.weight", module["weight"]) for name, module in zip(names, modules, strict=True)]
    _add_joined(draft, [f"{host}.weight" for host in hosts], weights, dim, linear.swap)
    if linear.bias:
        biases = [(f"{name}.bias", module["bias"]) for name, module in zip(names, modules, strict=True)]
        _add_joined(draft, [f"{host}.bias" for host in hosts], biases, -1 if dim else 0, linear.swap)


def _check_module(draft: Draft, name: str, module: dict[str, TensorInfo], part: StoredName, linear: LinearRow) -> None:
    for suffix, info in module.items():
        if suffix not in ("weight", "bias"):
            raise LayerError(f"{name}.{suffix} has no place in a 16-bit linear")
        _check_float(f"{name}.{suffix}", info)
    if "weight" not in module:
        raise LayerError(f"{name}.weight is missing")
    shape = module["weight"].shape
    needed = (draft.sizes.value(part.n), draft.sizes.value(part.k))
    is_linear = part.n is not None or part.k is not None
    if is_linear and (
        len(shape) != 2 or any(size not in (None, found) for size, found in zip(needed, shape, strict=True))
    ):
        needed_text = ", ".join("any" if size is None else str(size) for size in needed)
        raise LayerError(f"{name}.weight has shape {shape}, the model needs ({needed_text})")
    if linear.bias and "bias" not in module:
        raise LayerError(f"{name}.bias is missing")
    if "bias" in module and module["bias"].shape != shape[:1]:
        raise LayerError(f"{name}.bias has shape {module['bias'].shape}, needed {shape[:1]}")
    if "bias" in module and not linear.bias:
        _check_no_bias(name, draft.stored.read(f"{name}.bias"))


def _check_float(name: str, info: TensorInfo) -> None:
    if not info.dtype.is_floating_point:
        raise LayerError(f"{name} has dtype {str(info.dtype).removeprefix('torch.')}, needed floating point")


def _check_no_bias(name: str, bias: torch.Tensor) -> None:
    if bias.any():
        raise LayerError(f"{name} has a bias that is not zero, ComfyUI's model has none there")


def _add_joined(draft: Draft, hosts: list[str], stored: list[tuple[str, TensorInfo]], dim: int, swap: bool) -> None:
    """Stored tensors side by side along `dim` (-1: added up), in equal shares of the rows, one share per host name."""
    infos = [info for _, info in stored]
    if len({info.dtype for info in infos}) > 1:
        raise LayerError(f"parts have dtypes {', '.join(str(info.dtype) for info in infos)}, needed one")
    if dim >= 0 and len({info.shape[:dim] + info.shape[dim + 1 :] for info in infos}) > 1:
        raise LayerError(f"parts have shapes {', '.join(str(info.shape) for info in infos)}, which do not join")
    shape = list(infos[0].shape)
    if dim >= 0:
        shape[dim] = sum(info.shape[dim] for info in infos)
    if shape[0] % len(hosts) or (swap and shape[0] % 2):
        raise LayerError(f"{shape[0]} rows are not {max(len(hosts), 2)} equal shares")

    def read() -> torch.Tensor:
        tensors = [draft.stored.read(name) for name, _ in stored]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim) if dim >= 0 else _added(tensors)
        return torch.cat(joined.chunk(2)[::-1]) if swap else joined.to(infos[0].dtype)

    rows = shape[0] // len(hosts)
    for i, host in enumerate(hosts):
        info = TensorInfo((rows, *shape[1:]), infos[0].dtype)
        draft.add_rest(host, info, read if len(hosts) == 1 else _rows_of(read, i * rows, rows))


def _added(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum((tensor.float() for tensor in tensors), torch.zeros(()))


def _rows_of(read: Reader, start: int, count: int) -> Reader:
    return lambda: read()[start : start + count].contiguous()


def add_biases(
    draft: Draft, hosts: tuple[str, ...], layers: Sequence[StoredLayer], linear: LinearRow, chunks: int
) -> None:
    """The biases of 4-bit layers under ComfyUI's names. Raises LayerError for a missing or a surplus one."""
    readers = [_bias_reader(draft, layer, chunks) for layer in layers if "bias" in layer.parts]
    if not linear.bias:
        for layer, read in zip((layer for layer in layers if "bias" in layer.parts), readers, strict=True):
            _check_no_bias(layer.name, read())
        return
    columns = linear.join == "columns" and len(layers) > 1
    if "bias" not in layers[-1].parts or (len(readers) < len(layers) and not columns):  # of columns the last has it
        raise LayerError("bias is missing")
    dtype = draft.stored.layers[layers[0].name]["bias"].dtype if "bias" in layers[0].parts else readers[0]().dtype
    if chunks:
        dtype = torch.float32
    if columns and sum(bool(read().any()) for read in readers) > 1:
        dtype = torch.float32  # a sum of 16-bit numbers is no 16-bit number

    def read_all() -> torch.Tensor:
        biases = [read() for read in readers]
        if columns:
            return _added(biases).to(dtype)
        bias = torch.cat(biases) if len(biases) > 1 else biases[0]
        return torch.cat(bias.chunk(2)[::-1]) if linear.swap else bias

    n = layers[0].n if columns else sum(layer.n for layer in layers)
    rows = n // len(hosts)
    for i, host in enumerate(hosts):
        share = read_all if len(hosts) == 1 else _rows_of(read_all, i * rows, rows)
        draft.add_rest(f"{host}.bias", TensorInfo((rows,), dtype), share)


def _bias_reader(draft: Draft, layer: StoredLayer, chunks: int) -> Reader:
    def read() -> torch.Tensor:
        bias = read_bias(layer, draft.stored.part_reader(layer.name), chunks)
        if not bias.isfinite().all():
            raise LayerError("bias holds NaN or Inf; the file is damaged or was written by a failed run")
        return bias

    return read


def add_tensor(draft: Draft, host: str, key: str) -> None:
    """A tensor that is no linear, as it is. Raises LayerError for a norm that is no vector."""
    module, _, suffix = key.rpartition(".")
    info = draft.stored.plain[module][suffix]
    _check_float(key, info)
    if "norm" in key and len(info.shape) != 1:
        raise LayerError(f"has shape {info.shape}, needed a vector")
    draft.add_rest(host, info, lambda: draft.stored.read(key))
