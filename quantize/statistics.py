"""What the quantizer has to know of a layer's input: collected while a model runs, kept in one file.

A statistics file is a `.safetensors` file that is laid out in full when it is made and filled in place: token rows go
to their slots by memory map, so that a run needs little memory however many tokens it keeps, and nothing is copied at
the end. X is a layer's name; layers that read the same activation share one entry, under the first one's name.

    X.tokens  bf16  (T, K)    kept activations, before shift and smoothing; rows from `kept` on are unused
    X.key     fp32  (T,)      the random number that let a token in; 0 in unused rows
    X.stratum int16 (T,)      which stratum it stands for, see `Stratum`
    X.hold    uint8 (T,)      1: never fitted to, only measured on
    X.absmax  fp32  (BUCKETS, K)   per channel and step bucket, over all tokens seen
    X.square  fp32  (BUCKETS, K)   sum of squares
    X.count   int64 (BUCKETS,)     tokens seen
    X.sensitivity fp32 (2,)   sum of ||dv||^2 / ||v||^2 per ||dy||^2 / ||y||^2 where it was measured, and how often

Which tokens stay is bottom-k sampling: every token draws a key, each stratum keeps its largest, and room is shared by
rank within the stratum. So every stratum that was ever seen is present, rare ones whole, and two files merge into the
one that a single longer run would have given.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .tensor_file import DTYPE_NAMES, TensorFile, TensorInfo

BUCKETS = 8  # equal parts of a sampling run
POSITIONS = 4  # equal parts of the sequence: text comes before or after the image
HALVES = 2  # with the prompt, and the unconditional half of classifier-free guidance
HOLD_OUT = 0.1
METADATA_ROOM = 1 << 18
ALIGNMENT = 64


class StatisticsError(ValueError):
    """Statistics cannot be collected, read or used. The message names the layer or file."""


@dataclass(frozen=True)
class Call:
    """One call of the model inside a run, as the layers need to know it.

    step, steps  which step of how many; a sampler may call the model more than once per step
    halves       per batch chunk: 0 with the prompt, 1 without; batch rows are split evenly among them
    batch        rows of the model's input
    """

    step: int
    steps: int
    halves: tuple[int, ...] = (0,)
    batch: int = 1

    @property
    def bucket(self) -> int:
        return min(BUCKETS - 1, self.step * BUCKETS // max(1, self.steps))

    def strata(self, shape: Sequence[int]) -> torch.Tensor:
        """(M,) the stratum of every row of an activation of this shape (..., K)."""
        rows = math.prod(shape[:-1])
        half = torch.zeros(rows, dtype=torch.int64)
        position = torch.zeros(rows, dtype=torch.int64)
        if len(shape) > 2 and shape[0] == self.batch:
            per_image = rows // shape[0]
            image = torch.arange(rows) // per_image
            half = torch.tensor(self.halves)[image * len(self.halves) // shape[0]]
            position = torch.arange(rows) % per_image * POSITIONS // per_image
        return (self.bucket * HALVES + half.clamp(0, HALVES - 1)) * POSITIONS + position


def bucket_of(strata: torch.Tensor) -> torch.Tensor:
    return strata // (HALVES * POSITIONS)


def survivors(keys: torch.Tensor, strata: torch.Tensor, room: int) -> torch.Tensor:
    """Indices of the tokens that stay: by rank of the key within the stratum, then by key. At most `room`."""
    if len(keys) <= room:
        return torch.arange(len(keys))
    by_key = keys.argsort(descending=True, stable=True)
    order = by_key[strata[by_key].argsort(stable=True)]  # stratum by stratum, each with falling keys
    sizes = strata.bincount()
    first = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(keys)) - first[strata[order]]
    score = rank.double() + (1 - keys.double())  # keys lie in (0, 1]
    return score.argsort(stable=True)[:room]


@dataclass
class Entry:
    """The statistics of one layer, as views of the file."""

    tokens: torch.Tensor
    key: torch.Tensor
    stratum: torch.Tensor
    hold: torch.Tensor
    absmax: torch.Tensor
    square: torch.Tensor
    count: torch.Tensor
    sensitivity: torch.Tensor

    @property
    def kept(self) -> int:
        return int((self.key > 0).sum())

    def observe(self, x: torch.Tensor, call: Call, generator: torch.Generator) -> bool:
        """Take in one activation (..., K). Returns False, and changes nothing, if it holds NaN or Inf."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if not len(rows):
            return True
        absmax = rows.abs().amax(0).float().cpu()
        if not absmax.isfinite().all():
            return False
        self.absmax[call.bucket] = torch.maximum(self.absmax[call.bucket], absmax)
        self.square[call.bucket] += rows.float().square().sum(0).cpu()
        self.count[call.bucket] += len(rows)
        keys = 1 - torch.rand(len(rows), generator=generator)
        hold = torch.rand(len(rows), generator=generator) < HOLD_OUT
        self._admit(keys, call.strata(x.shape), hold.to(torch.uint8), rows)
        return True

    def _admit(self, keys: torch.Tensor, strata: torch.Tensor, hold: torch.Tensor, rows: torch.Tensor) -> None:
        """Let new tokens compete for the slots; only the rows that win are copied, each into the slot of a loser."""
        used = self.key > 0
        room, old = len(self.key), used.nonzero()[:, 0]
        stay = survivors(torch.cat([self.key[old], keys]), torch.cat([self.stratum[old].long(), strata]), room)
        won = stay[stay >= len(old)] - len(old)
        if not len(won):
            return
        free = ~used
        free[old] = ~torch.isin(torch.arange(len(old)), stay)
        slots = free.nonzero()[:, 0][: len(won)]
        self.tokens[slots] = rows[won.to(rows.device)].to("cpu", self.tokens.dtype)
        self.key[slots], self.hold[slots] = keys[won], hold[won]
        self.stratum[slots] = strata[won].to(torch.int16)

    def merge(self, other: "Entry") -> None:
        """As if this entry had seen what the other one saw."""
        self.absmax.copy_(torch.maximum(self.absmax, other.absmax))
        self.square += other.square
        self.count += other.count
        self.sensitivity += other.sensitivity
        there = (other.key > 0).nonzero()[:, 0]
        self._admit(other.key[there], other.stratum[there].long(), other.hold[there], other.tokens[there])

    def part(self, hold: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens (M, K), step bucket (M,)) of the hold-out part, or of the part to fit to."""
        chosen = ((self.key > 0) & (self.hold == int(hold))).nonzero()[:, 0]
        return self.tokens[chosen], bucket_of(self.stratum[chosen].long())

    def channel_absmax(self) -> torch.Tensor:
        return self.absmax.amax(0)

    def channel_square(self) -> torch.Tensor:
        """(K,) mean square with every step bucket counted alike."""
        seen = self.count > 0
        return (self.square[seen] / self.count[seen, None]).mean(0) if seen.any() else self.square[0]


PARTS = {
    "tokens": torch.bfloat16,
    "key": torch.float32,
    "stratum": torch.int16,
    "hold": torch.uint8,
    "absmax": torch.float32,
    "square": torch.float32,
    "count": torch.int64,
    "sensitivity": torch.float32,
}


def _infos(layer: str, k: int, room: int) -> dict[str, TensorInfo]:
    shapes = {
        "tokens": (room, k),
        "absmax": (BUCKETS, k),
        "square": (BUCKETS, k),
        "count": (BUCKETS,),
        "sensitivity": (2,),
    }
    return {f"{layer}.{part}": TensorInfo(shapes.get(part, (room,)), dtype) for part, dtype in PARTS.items()}


class Statistics:
    """layer -> Entry of one statistics file.

    metadata  family, shared (layer -> the entry it reads), runs (one record per finished run), seed
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: dict[str, object], writable: bool) -> None:
        self.path, self.entries, self.metadata, self._writable = path, dict(entries), metadata, writable

    @classmethod
    def create(
        cls, path: str | Path, widths: Mapping[str, int], room: int, metadata: Mapping[str, object]
    ) -> "Statistics":
        """A new file for layers of these input widths, `room` tokens each; sparse until it is filled."""
        path = Path(path)
        infos = {name: info for layer, k in widths.items() for name, info in _infos(layer, k, room).items()}
        # widest numbers first: then each tensor is aligned for its own, without gaps, which safetensors forbids
        infos = dict(sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize))
        header, offset = {}, 0
        for name, info in infos.items():
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_disk(path, offset - _taken(path))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            _write_header(file, header, dict(metadata), None)
            file.truncate(file.tell() + offset)
        temporary.replace(path)
        return cls.open(path, writable=True)

    @classmethod
    def open(cls, path: str | Path, writable: bool = False) -> "Statistics":
        """Map a file. Raises StatisticsError if it is not a statistics file of this version."""
        path = Path(path)
        file = TensorFile(path)
        if "statistics" not in file.metadata:
            raise StatisticsError(f"{path.name}: is no statistics file, SVDQuant Calibrate writes those")
        metadata = json.loads(file.metadata["statistics"])
        if metadata.get("version") != 1:
            raise StatisticsError(f"{path.name}: statistics of version {metadata.get('version')}, this pack reads 1")
        names = dict.fromkeys(name.rpartition(".")[0] for name in file)
        if writable:
            _check_disk(path, path.stat().st_size - _taken(path))
            tensors = _map_writable(path, file.infos)
            return cls(path, _entries(names, tensors.__getitem__), metadata, True)
        return cls(path, _entries(names, file.__getitem__), metadata, False)

    def entry(self, layer: str) -> Entry | None:
        """The statistics of the activation that `layer` reads, None where the file has none."""
        shared = self.metadata.get("shared", {})
        return self.entries.get(shared.get(layer, layer))

    def save(self) -> None:
        """Write the metadata; the tensors are in the file already."""
        assert self._writable
        with self.path.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            file.seek(0)
            _write_header(file, header, self.metadata, size)

    def add_run(self, **record: object) -> None:
        """Note a finished run and save."""
        self.metadata.setdefault("runs", []).append(record)
        self.save()


def _taken(path: Path) -> int:
    """Bytes that a file takes on disk; all of them where the system does not know of sparse files."""
    if not path.exists():
        return 0
    stat = path.stat()
    return stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size


def _check_disk(path: Path, more: int) -> None:
    """A full disk under a mapped file kills the process, so there has to be room for all of it from the start."""
    free = shutil.disk_usage(path.parent).free
    if more > free:
        raise StatisticsError(
            f"{path.name} may grow by {more:,} bytes and {free:,} are free in {path.parent}: keep fewer tokens, allow "
            "less disk, or make room"
        )


def _entries(names: Iterable[str], read: object) -> dict[str, Entry]:
    return {name: Entry(**{part: read(f"{name}.{part}") for part in PARTS}) for name in names}


def _write_header(file: object, header: Mapping[str, object], metadata: Mapping[str, object], size: int | None) -> None:
    text = {"statistics": json.dumps({**metadata, "version": 1})}
    data = json.dumps({"__metadata__": text, **header}, separators=(",", ":")).encode()
    if size is None:
        size = len(data) + METADATA_ROOM
        size += -(8 + size) % ALIGNMENT
    if len(data) > size:
        raise StatisticsError("the statistics file has no room for more runs: start a new one and merge them")
    file.write(size.to_bytes(8, "little") + data.ljust(size))


def _map_writable(path: Path, infos: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Views of the file that write through to it."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=path.stat().st_size)
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    tensors = {}
    for name, info in infos.items():
        start, stop = (8 + size + offset for offset in header[name]["data_offsets"])
        tensors[name] = whole[start:stop].view(info.dtype).view(info.shape)
    return tensors


def merge(paths: Sequence[str | Path], target: str | Path) -> Statistics:
    """One file with what several runs of the same model saw.

    raises  StatisticsError if the files' layers or widths differ, or a run is in two of them
    """
    files = [Statistics.open(path) for path in paths]
    widths = {layer: entry.tokens.shape[1] for layer, entry in files[0].entries.items()}
    runs: list[dict[str, object]] = []
    for file in files:
        found = {layer: entry.tokens.shape[1] for layer, entry in file.entries.items()}
        if found != widths:
            raise StatisticsError(f"{file.path.name} and {files[0].path.name} are statistics of different models")
        for run in file.metadata.get("runs", []):
            if any(run["id"] == other["id"] for other in runs):
                raise StatisticsError(f"{file.path.name}: holds a run that another file holds too; counted once only")
            runs.append(run)
    room = max(len(entry.key) for file in files for entry in file.entries.values())
    merged = Statistics.create(target, widths, room, {**files[0].metadata, "runs": runs})
    for file in files:
        for layer, entry in file.entries.items():
            merged.entries[layer].merge(entry)
    return merged


def describe(path: str | Path) -> dict[str, object]:
    """What a statistics file holds, as plain data."""
    file = Statistics.open(path)
    entries = file.entries.values()
    return {
        "file": file.path.name,
        "kind": "statistics",
        "family": file.metadata.get("family", ""),
        "runs": file.metadata.get("runs", []),
        "layers": {
            layer: {
                "channels": entry.tokens.shape[1],
                "tokens": entry.kept,
                "hold_out": int(entry.hold[entry.key > 0].sum()),
                "seen": int(entry.count.sum()),
                "absmax": entry.absmax.amax().item(),
            }
            for layer, entry in file.entries.items()
        },
        "measured_sensitivity": sum(bool(entry.sensitivity[1]) for entry in entries),
        "bytes": file.path.stat().st_size,
    }


def tokens_for(widths: Mapping[str, int], wanted: int, disk: int) -> int:
    """Tokens per layer: `wanted`, or as many as `disk` bytes hold."""
    return max(64, min(wanted, disk // max(1, 2 * sum(widths.values()))))
