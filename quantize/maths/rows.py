"""Some output channels of a layer, whatever its format calls its tensors."""

from collections.abc import Mapping

import torch

from ...kernels.layer import LayerSpec


def rows_of(tensors: Mapping[str, torch.Tensor], spec: LayerSpec, rows: slice) -> dict[str, torch.Tensor]:
    """The tensors of some output channels of a layer; what belongs to its input or to all of it stays whole

    >>> spec = LayerSpec("int4", n=4, k=64)
    >>> tensors = {"qweight": torch.zeros(4, 32, dtype=torch.int8), "wscales": torch.ones(1, 4)}
    >>> {name: tuple(tensor.shape) for name, tensor in rows_of(tensors, spec, slice(1, 3)).items()}
    {'qweight': (2, 32), 'wscales': (1, 2)}
    """
    parts, wider = (spec.fmt.parts(n, spec.k, spec.rank) for n in (spec.n, spec.n + 1))
    found = {}
    for name, tensor in tensors.items():
        pairs = zip(parts[name].shape, wider[name].shape, strict=True)
        along = next((axis for axis, (size, other) in enumerate(pairs) if size != other), None)
        if along is not None:
            tensor = tensor.movedim(along, 0)[rows].movedim(0, along).contiguous()
        found[name] = tensor
    return found
