"""Checksums of a file: what is read is what was written, or an error says which tensor or header string is not.

    svdquant_checksums  in the header's string table, JSON
                        {"method": "crc32", "strings": {key: checksum}, "tensors": {name: checksum}}

    crc32(data, crc32(JSON [name, dtype, shape]))  of a tensor, dtype as the header has it
    crc32(text, crc32(key))                        of every other string of the table

each as 8 hex digits. So no two tensors can change places, and what is gone is missed. Checksums are made while a file
is written and compared when a tensor is read, without a pass of their own. crc32, because it costs a loader least: it
has 3.1 GB/s on one core, blake2b 0.7 and sha256 0.4. tests/bench/bench_load.py prints its share of the load time.

They find damage: a disk, a bad copy, a tool that writes half of what it has read. They prove nothing about a file that
somebody wants to look right; for that compare its sha256 with what its author says.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch

from ...kernels.bounded_json import HEADER, JsonError, read_object

KEY = "svdquant_checksums"
METHOD = "crc32"
ADVICE = (
    "The file is damaged or was edited after it was written: download it or make it again. "
    f"`python -m quantize verify` lists all there is; who edited it on purpose removes {KEY} from its header"
)


def checksum(data: Any, about: str) -> str:
    """crc32(data, crc32(about)) in hex; `data` is anything with a buffer."""
    return f"{crc32(data, crc32(about.encode())):08x}"


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on any device, in its order; of one on the CPU without a copy"""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def of_tensor(name: str, dtype: str, shape: Sequence[int], data: Any) -> str:
    """The checksum of a tensor's bytes under this name, dtype (`F16`, `I8`, ...) and shape.

    >>> of_tensor("x.weight", "U8", (3,), b"abc")
    '9e4f7d83'
    >>> of_tensor("x.weight", "I8", (3,), b"abc")
    '975dddfe'
    """
    return checksum(data, json.dumps([name, dtype, list(shape)]))


@dataclass(frozen=True)
class Manifest:
    """The checksums of one file: `tensors` by name, `strings` by key of the header's table."""

    tensors: dict[str, str] = field(default_factory=dict)
    strings: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Manifest":
        """Inverse of `text`. Raises JsonError for anything else."""
        where = f"{KEY} in the header"
        found = read_object(text, where, {"method": str, "strings": dict, "tensors": dict}, HEADER)
        if found.get("method") != METHOD:
            raise JsonError(f"{where} are of the kind {found.get('method')!r:.40}, this pack knows {METHOD}")
        return cls(found.get("tensors", {}), found.get("strings", {}))

    def text(self, strings: Mapping[str, str]) -> str:
        """What stands in the header, beside these strings."""
        made = {key: checksum(value.encode(), key) for key, value in strings.items()}
        return json.dumps({"method": METHOD, "strings": made, "tensors": self.tensors}, separators=(",", ":"))

    def problems(self, names: Iterable[str], strings: Mapping[str, str]) -> list[str]:
        """What the header of a file with these tensors and strings has that was not written, or lacks.

        A string that was added is no damage: tools that sort models leave titles and pictures there.
        """
        names = set(names)
        found = [f"tensor {name} is gone" for name in sorted(self.tensors.keys() - names)]
        found += [f"tensor {name} was not written with the others" for name in sorted(names - self.tensors.keys())]
        for key, written in sorted(self.strings.items()):
            if key not in strings:
                found.append(f"{key} in the header is gone")
            elif written != checksum(strings[key].encode(), key):
                found.append(f"{key} in the header is not what was written")
        return found

    def refuses(self, name: str, dtype: str, shape: Sequence[int], data: Any) -> str | None:
        """Why this is not the tensor that was written, or None."""
        if self.tensors.get(name) == of_tensor(name, dtype, shape, data):
            return None
        return f"tensor {name} is not what was written: its name, dtype, shape or bytes are others"
