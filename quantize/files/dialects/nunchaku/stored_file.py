"""A Nunchaku file while it is opened: its tensors sorted into layers, and what becomes of each of them."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .....kernels.layer import LayerSpec
from ...checkpoint import CheckpointError
from ...tensor_file import TensorFile, TensorInfo
from .header import foreign_format
from .layers import PARTS, StoredLayer, read_layer
from .tables import Sizes

Reader = Callable[[], Any]


@dataclass
class StoredFile:
    """A file, its tensors grouped into 4-bit layers and the rest.

    layers   layer name -> {our part name: TensorInfo}
    parts    layer name -> {our part name: name in the file}
    plain    module name -> {suffix: TensorInfo} of everything else
    """

    file: TensorFile
    layers: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    plain: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    _cache: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    _buffers: threading.local = field(default_factory=threading.local)

    def read(self, name: str) -> torch.Tensor:
        return self.file.read(name)

    def part_reader(self, layer: str) -> Callable[[str], torch.Tensor]:
        """our part name -> the tensor as stored; codes are valid until the next codes are read"""
        return lambda part: self._read_codes(layer) if part == "qweight" else self.read(self.parts[layer][part])

    def _read_codes(self, layer: str) -> torch.Tensor:
        """Into one buffer for all layers: to get fresh memory from the system takes longer than to unpack."""
        info = self.layers[layer]["qweight"]
        buffer = getattr(self._buffers, "codes", None)
        if buffer is None or buffer.nbytes < info.nbytes:
            buffer = self._buffers.codes = torch.empty(info.nbytes, dtype=torch.uint8)
        return self.file.read(self.parts[layer]["qweight"], buffer)

    def read_cached(self, layer: StoredLayer, chunks: int) -> dict[str, torch.Tensor]:
        """A stored layer; the last one is kept, because ComfyUI asks for q, k and v one after the other."""
        if layer.name not in self._cache:
            self._cache.clear()
            self._cache[layer.name] = read_layer(layer, self.part_reader(layer.name), chunks)
        return self._cache[layer.name]


def group(file: TensorFile, as_is: bool = False) -> StoredFile:
    """Sort the tensors of a file into layers. Raises CheckpointError for a part that belongs to no layer.

    as_is  such parts are ordinary tensors
    """
    stored, name = StoredFile(file), file.path.name
    layers = [key.removesuffix(".qweight") for key in file if key.endswith(".qweight")]
    stored.layers, stored.parts = {layer: {} for layer in layers}, {layer: {} for layer in layers}
    for key in file:
        layer, _, suffix = key.rpartition(".")
        part = PARTS.get(suffix)
        if layer in stored.layers:
            if part is None or part in stored.parts[layer]:
                problem = "is not part of a 4-bit layer of Nunchaku" if part is None else "is there in two spellings"
                raise CheckpointError(f"{name}: layer {layer!r}: {suffix} {problem}. {foreign_format(suffix)}".rstrip())
            stored.parts[layer][part], stored.layers[layer][part] = key, file.infos[key]
        elif part is not None and part != "bias" and not as_is:
            raise CheckpointError(
                f"{name}: {key} belongs to a 4-bit layer, but {layer}.qweight is missing. "
                "The file is not whole: download it again."
            )
        else:
            stored.plain.setdefault(layer, {})[suffix] = file.infos[key]
    return stored


@dataclass
class Draft:
    """What a Checkpoint is made of, collected linear by linear.

    lite   signed activations and modulation rows in natural order: Nunchaku Lite
    hints  stored layer -> logical (N, K) as the header has it, of padded layers
    groups ComfyUI's layers that are one stored layer
    """

    stored: StoredFile
    lite: bool
    sizes: Sizes
    hints: Mapping[str, tuple[int, int]]
    specs: dict[str, LayerSpec] = field(default_factory=dict)
    rest: dict[str, TensorInfo] = field(default_factory=dict)
    layer_readers: dict[str, Reader] = field(default_factory=dict)
    rest_readers: dict[str, Reader] = field(default_factory=dict)
    groups: list[tuple[str, ...]] = field(default_factory=list)

    def add_layer(self, name: str, spec: LayerSpec, read: Reader) -> None:
        self.specs[name], self.layer_readers[name] = spec, read

    def add_rest(self, name: str, info: TensorInfo, read: Reader) -> None:
        self.rest[name], self.rest_readers[name] = info, read
