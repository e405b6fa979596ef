"""What the quantizer has to know of a layer's input: collected while a model runs, kept in one file.

A statistics file is a `.safetensors` file that is laid out in full when it is made and filled in place: token rows go
to their slots by memory map, so that a run needs little memory however many tokens it keeps, and nothing is copied at
the end. X is a layer's name; layers that read the same activation share one entry, under the first one's name.

While a run fills it the header says `"finished": false` and has no checksums; they come when the run has ended (see
`files/integrity.py`). So a file whose run was killed is unfinished, and can be used and gone on with; one that has
checksums which are not those of its tensors is damaged. Reading maps nothing. Writing does: its disk is taken before,
but if somebody cuts the file short meanwhile, the system ends the process.

    X.tokens  bf16  (T, K)    kept activations, before shift and smoothing; rows from `kept` on are unused
    X.key     fp32  (T,)      the random number that let a token in; 0 in unused rows
    X.stratum int16 (T,)      which stratum it stands for, see `ModelCall.strata`
    X.hold    uint8 (T,)      1: never fitted to, only measured on
    X.absmax  fp32  (BUCKETS, K)   per channel and step bucket, over all tokens seen
    X.square  fp32  (BUCKETS, K)   sum of squares
    X.count   int64 (BUCKETS,)     tokens seen
    X.sensitivity fp32 (2,)   sum of ||dv||^2 / ||v||^2 per ||dy||^2 / ||y||^2 where it was measured, and how often

Which tokens stay: see `tokens.py`.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from ...kernels.bounded_json import HEADER, JsonError, Kind, read_object
from ...kernels.layer import is_finite
from ..files import integrity
from ..files.lifecycle import reserve, temporary_for
from ..files.tensor_file import DTYPE_NAMES, TensorFile, TensorFileError, TensorInfo
from .tokens import BUCKETS, HALVES, POSITIONS, InputStatistics

METADATA_ROOM = 1 << 18
STRATA = BUCKETS * HALVES * POSITIONS
LARGEST_VALUE = 1e15  # its square, added up over all tokens, is a float32 number
ALIGNMENT = 64


class StatisticsError(ValueError):
    """Statistics cannot be collected, read or used. The message names the layer or file."""


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


KINDS: dict[str, Kind] = {"version": int, "family": str, "shared": dict, "runs": list, "seed": int, "finished": bool}


def _infos(layer: str, k: int, room: int) -> dict[str, TensorInfo]:
    shapes = {
        "tokens": (room, k),
        "absmax": (BUCKETS, k),
        "square": (BUCKETS, k),
        "count": (BUCKETS,),
        "sensitivity": (2,),
    }
    return {f"{layer}.{part}": TensorInfo(shapes.get(part, (room,)), dtype) for part, dtype in PARTS.items()}


class ReadEntries(Mapping[str, InputStatistics]):
    """layer -> its statistics, read anew each time: no more of them are in memory than somebody holds."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._layers = dict.fromkeys(name.rpartition(".")[0] for name in file)

    def __getitem__(self, layer: str) -> InputStatistics:
        return InputStatistics(**{part: self.part(layer, part) for part in PARTS})

    def part(self, layer: str, part: str) -> torch.Tensor:
        """One tensor of an entry. Raises StatisticsError where it is not what was written."""
        try:
            return self._file.read(f"{layer}.{part}")
        except TensorFileError as error:
            if _is_being_filled(self._file.path):
                raise StatisticsError(
                    f"{self._file.path.name}: a run is writing it, wait until that has ended"
                ) from error
            raise StatisticsError(f"{error}; or calibrate again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class Statistics:
    """layer -> InputStatistics of one statistics file.

    entries   layer -> InputStatistics; of a writable file views of it, else read when they are asked for
    widths    layer -> input channels
    room      most tokens that an entry can keep
    metadata  family, shared (layer -> the entry it reads), runs (one record per finished run), seed, finished

        >>> import tempfile
        >>> from svdquant_pack.quantize.calibration.tokens import ModelCall
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = Statistics.create(f"{folder}/s.safetensors", {"blocks.0.proj": 128}, 64, {"family": "generic"})
        ...     x = torch.randn(1, 100, 128)  # what the layer reads in step 0 of 8
        ...     _ = made.entry("blocks.0.proj").observe(x, ModelCall(0, 8), torch.Generator())
        ...     made.add_run(id="1", steps=8)
        ...     entry = Statistics.open(made.path).entry("blocks.0.proj")
        >>> entry.kept, int(entry.count.sum()), torch.equal(entry.channel_absmax(), x.abs().amax((0, 1)))
        (64, 100, True)
    """

    def __init__(
        self, file: TensorFile, metadata: dict[str, Any], mapped: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.path, self.metadata, self._mapped = file.path, metadata, mapped
        self.stored = ReadEntries(file)
        self.entries: Mapping[str, InputStatistics] = self.stored
        if mapped is not None:
            parts = {layer: {part: mapped[f"{layer}.{part}"] for part in PARTS} for layer in self.stored}
            self.entries = {layer: InputStatistics(**tensors) for layer, tensors in parts.items()}
        self.has_checksums = file.has_checksums
        shapes = {layer: file.infos[f"{layer}.tokens"].shape for layer in self.stored}
        self.widths = {layer: k for layer, (_, k) in shapes.items()}
        self.room = max((tokens for tokens, _ in shapes.values()), default=0)
        self._checked: set[str] = set()

    @property
    def finished(self) -> bool:
        """Whether no run was filling the file when it was opened; files of earlier versions do not say."""
        return self.metadata.get("finished") is not False

    @classmethod
    def create(
        cls, path: str | Path, widths: Mapping[str, int], room: int, metadata: Mapping[str, Any]
    ) -> "Statistics":
        """A new file for layers of these input widths, `room` tokens each, all of whose disk is taken."""
        path = Path(path)
        infos = {name: info for layer, k in widths.items() for name, info in _infos(layer, k, room).items()}
        # widest numbers first: then each tensor is aligned for its own, without gaps, which safetensors forbids
        infos = dict(sorted(infos.items(), key=lambda item: item[1].dtype.itemsize, reverse=True))
        header, offset = {}, 0
        for name, info in infos.items():
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_for(path)
        _check_disk(path, offset)
        try:
            with temporary.open("wb") as file:
                _write_header(file, header, {**metadata, "finished": False})
                size = file.tell() + offset
                reserve(file, size)
                file.truncate(size)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return cls.open(path, writable=True)

    @classmethod
    def open(cls, path: str | Path, writable: bool = False) -> "Statistics":
        """Open a file; `writable` maps it, after its checksums were compared.

        raises  StatisticsError if it is not a whole statistics file of this version
        """
        path = Path(path)
        file = TensorFile(path)
        if "statistics" not in file.metadata:
            raise StatisticsError(f"{path.name}: is no statistics file, SVDQuant Calibrate writes those")
        try:
            metadata = read_object(file.metadata["statistics"], f"{path.name}: statistics in the header", KINDS)
        except JsonError as error:
            raise StatisticsError(str(error)) from error
        _check_metadata(path, metadata)
        if metadata.get("version") != 1:
            raise StatisticsError(f"{path.name}: statistics of version {metadata.get('version')}, this pack reads 1")
        _check_entries(path, file)
        found = cls(file, metadata)
        if not writable:
            return found
        if file.has_checksums:  # what is added to would be damaged for good, under new checksums
            for layer in found.stored:
                found.stored[layer]
        _check_disk(path, path.stat().st_size - _taken(path))
        return cls(file, metadata, _map_writable(path, file.infos))

    def entry(self, layer: str) -> InputStatistics | None:
        """The statistics of the activation that `layer` reads, None where the file has none.

        raises  StatisticsError for numbers that no run can have written
        """
        shared = self.metadata.get("shared", {})
        name = shared.get(layer, layer)
        entry = self.entries.get(name)
        if entry is not None and name not in self._checked and self._mapped is None:
            _check_values(self.path, name, entry)
            self._checked.add(name)
        return entry

    def of_group(self, layers: Iterable[str]) -> InputStatistics | None:
        """The statistics of the activation that all of `layers` read."""
        return next((entry for layer in layers if (entry := self.entry(layer)) is not None), None)

    def begin(self) -> None:
        """Say in the file that it is being filled, before anything is; `save` takes that back."""
        if self.finished:
            self._rewrite_header({"finished": False}, None)

    def save(self) -> None:
        """Write metadata and checksums; the tensors are in the file already."""
        assert self._mapped is not None
        with ThreadPoolExecutor() as pool:  # of gigabytes, after every run
            checksums = dict(pool.map(_checksum, self._mapped.items()))
        self._rewrite_header({"finished": True}, integrity.Manifest(checksums))

    def _rewrite_header(self, changes: Mapping[str, Any], manifest: integrity.Manifest | None) -> None:
        self.metadata |= changes
        with self.path.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = read_object(file.read(size), f"{self.path.name}: its header", limits=HEADER)
            header.pop("__metadata__", None)
            file.seek(0)
            _write_header(file, header, self.metadata, manifest, size)

    def add_run(self, **record: object) -> None:
        """Note a finished run and save."""
        self.metadata.setdefault("runs", []).append(record)
        self.save()


def _checksum(item: tuple[str, torch.Tensor]) -> tuple[str, str]:
    name, part = item
    return name, integrity.of_tensor(name, DTYPE_NAMES[part.dtype], part.shape, integrity.bytes_of(part))


def _is_being_filled(path: Path) -> bool:
    try:
        return not Statistics.open(path).finished
    except ValueError:
        return False


def _check_entries(path: Path, file: TensorFile) -> None:
    """Raise StatisticsError unless every layer has all parts, in the shapes and dtypes of one room and width."""
    infos, names = file.infos, dict.fromkeys(name.rpartition(".")[0] for name in file)
    for layer in names:
        tokens = infos.get(f"{layer}.tokens")
        if tokens is None or len(tokens.shape) != 2 or 0 in tokens.shape:
            found = "missing" if tokens is None else f"of shape {tokens.shape}"
            raise StatisticsError(f"{path.name}: layer {layer!r}: tokens is {found}, needed (tokens, channels)")
        room, k = tokens.shape
        for name, needed in _infos(layer, k, room).items():
            if infos.get(name) != needed:
                raise StatisticsError(
                    f"{path.name}: layer {layer!r}: {name.rpartition('.')[2]} is {infos.get(name)}, needed {needed}"
                )
    for name in infos:
        if name.rpartition(".")[2] not in PARTS:
            raise StatisticsError(f"{path.name}: {name} is no part of statistics")


def _check_values(path: Path, layer: str, entry: InputStatistics) -> None:
    """Raise StatisticsError for NaN, Inf, and numbers out of range: they end in errors far from here, or in none."""
    place = f"{path.name}: layer {layer!r}"
    for part in ("tokens", "key", "absmax", "square", "sensitivity"):
        if not is_finite(getattr(entry, part)):
            raise StatisticsError(f"{place}: {part} holds NaN or Inf: the file is damaged, calibrate again")
    ranges = {"key": (0, 1), "hold": (0, 1), "stratum": (0, STRATA - 1)}
    for part, (least, most) in ranges.items():
        low, high = (edge.item() for edge in getattr(entry, part).aminmax())
        if low < least or high > most:
            raise StatisticsError(f"{place}: {part} holds {low} to {high}, needed {least} to {most}: calibrate again")
    for part in ("absmax", "square", "count"):
        if getattr(entry, part).amin() < 0:
            raise StatisticsError(f"{place}: {part} holds a negative number: the file is damaged, calibrate again")
    largest = entry.tokens.abs().amax().item()
    if largest > LARGEST_VALUE:
        raise StatisticsError(
            f"{place}: tokens holds {largest:.3g}, at most {LARGEST_VALUE:.0e} can be squared and added"
        )


def _check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    if not all(isinstance(name, str) for name in metadata.get("shared", {}).values()):
        raise StatisticsError(f"{path.name}: shared in the header holds more than names of layers")
    if not all(isinstance(run, dict) and "id" in run for run in metadata.get("runs", [])):
        raise StatisticsError(f"{path.name}: runs in the header holds more than records of runs")


def _taken(path: Path) -> int:
    """Bytes that a file takes on disk; all of them where the system does not know of sparse files."""
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


def _write_header(
    file: BinaryIO,
    header: Mapping[str, Any],
    metadata: Mapping[str, Any],
    manifest: integrity.Manifest | None = None,
    size: int | None = None,
) -> None:
    """size  of the header that is there; None for a new one, which gets room for what runs and checksums will add"""
    strings = {"statistics": json.dumps({**metadata, "version": 1})}
    if size is None:
        longest = integrity.Manifest(dict.fromkeys(header, "checksum")).text(strings)
        size = len(_header_text({**strings, integrity.KEY: longest}, header)) + METADATA_ROOM
        size += -(8 + size) % ALIGNMENT
    if manifest is not None:
        strings[integrity.KEY] = manifest.text(strings)
    data = _header_text(strings, header)
    if len(data) > size:
        raise StatisticsError("the statistics file has no room for more runs: start a new one and merge them")
    file.write(size.to_bytes(8, "little") + data.ljust(size))


def _header_text(strings: Mapping[str, str], header: Mapping[str, Any]) -> bytes:
    return json.dumps({"__metadata__": strings, **header}, separators=(",", ":")).encode()


def _map_writable(path: Path, infos: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Views of the file that write through to it."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = read_object(file.read(size), f"{path.name}: its header", limits=HEADER)
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=path.stat().st_size)
    whole = torch.empty(0, dtype=torch.uint8).set_(cast(torch.UntypedStorage, storage))
    tensors = {}
    for name, info in infos.items():
        start, stop = (8 + size + offset for offset in header[name]["data_offsets"])
        tensors[name] = whole[start:stop].view(info.dtype).view(info.shape)
    return tensors
