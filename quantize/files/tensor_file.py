"""Safetensors files, read one tensor at a time and written one tensor at a time.

Reading copies a tensor into memory and compares its checksum, where the file has any (see `integrity.py`). Nothing is
mapped: a mapped file that somebody cuts short kills the process. Writing streams: the header's room is computed from a
plan, data follows as it is made, and the file gets its name only when it is whole.
"""

import contextlib
import io
import json
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from ...kernels.bounded_json import HEADER, USUAL, JsonError, read_object
from . import integrity
from .lifecycle import reserve, temporary_for

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA_ROOM = 1 << 14  # bytes kept free in the header for metadata that is known only at the end ...
METADATA_ROOM_PER_TENSOR = 24  # ... and more for what is said of each layer; a header that outgrows it costs a copy
ROOM_PER_EXTRA_TENSOR = 240  # its entry and its checksum, with a long name
COPY_BYTES = 1 << 26

# of whole checkpoints, of some exports, and of what ComfyUI saves of HunyuanVideo
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.")


class TensorFileError(ValueError):
    """A file cannot be read or written as safetensors. The message names the file."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorInfo":
        return cls(tuple(tensor.shape), tensor.dtype)


class TensorFile(Collection[str]):
    """The names of the tensors in one safetensors file, which `read` reads.

    infos     name -> TensorInfo, from the header alone
    metadata  the header's string table, without checksums
    problems  what is not as the checksums say; with `strict` there is none, or the file is refused
    raises    TensorFileError for a missing, truncated, changed or foreign file, KeyError for an unknown name

        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"a": torch.arange(3)}, f"{folder}/x.safetensors", {"family": "flux"})
        ...     file = TensorFile(f"{folder}/x.safetensors")
        ...     file.infos["a"].shape, file.read("a"), file.metadata, file.has_checksums
        ((3,), tensor([0, 1, 2]), {'family': 'flux'}, False)
    """

    def __init__(self, path: str | Path, strict: bool = True) -> None:
        self.path = Path(path)
        try:
            if self.path.is_dir():
                raise TensorFileError(f"{self.path}: is a folder, needed one file")
            self._stream = self.path.open("rb", buffering=0)  # this very file, whatever its name stands for later
        except FileNotFoundError as error:
            raise TensorFileError(f"{self.path}: there is no such file") from error
        except OSError as error:
            raise TensorFileError(f"{self.path}: cannot be opened ({error.strerror})") from error
        if not _is_text(str(self.path)):
            raise TensorFileError(f"{self.path}: its name is no text in UTF-8, which safetensors asks for: rename it")
        try:
            with safe_open(self._opened(), framework="pt", device="cpu") as file:
                # sorted: the library hands them out in another order in every process, and what is kept is written
                # again
                self.metadata: dict[str, str] = dict(sorted((file.metadata() or {}).items()))
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                self.infos = {name: _info(part.get_shape(), part.get_dtype()) for name, part in slices.items()}
            self._starts = _data_starts(self._stream)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise TensorFileError(
                f"{self.path.name}: not a whole safetensors file ({error}). It may be truncated: compare its size "
                "with the original and download or write it again."
            ) from error
        self._manifest, self.problems = self._take_manifest()
        if strict and self.problems:
            more = f", and {len(self.problems) - 1} more" if len(self.problems) > 1 else ""
            raise TensorFileError(f"{self.path.name}: {self.problems[0]}{more}. {integrity.ADVICE}")

    def _opened(self) -> Path:
        """A name of the file that is open: under its own there may be another one by now."""
        name = Path(f"/dev/fd/{self._stream.fileno()}")
        return name if name.exists() else self.path  # Windows has none, and no open file is replaced there

    def _take_manifest(self) -> tuple[integrity.Manifest | None, list[str]]:
        text = self.metadata.pop(integrity.KEY, None)
        if text is None:
            return None, []
        try:
            manifest = integrity.Manifest.parse(text)
        except JsonError as error:
            return None, [str(error)]
        return manifest, manifest.problems(self.infos, self.metadata)

    @property
    def has_checksums(self) -> bool:
        return self._manifest is not None

    def read(self, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """A copy in memory. Raises TensorFileError unless its checksum, where there is one, is that of the file.

        buffer  uint8 vector of at least the tensor's bytes to read into; the tensor is then a view of it
        """
        info = self.infos[name]
        data = torch.empty(info.nbytes, dtype=torch.uint8) if buffer is None else buffer[: info.nbytes]
        view, done = data.numpy().data, 0
        while done < info.nbytes:
            try:
                count = self._read_at(self._starts[name] + done, view[done:])
            except OSError as error:
                raise TensorFileError(f"{self.path.name}: {name} cannot be read ({error})") from error
            if not count:
                raise TensorFileError(f"{self.path.name}: {name} ends early; the file was changed after it was opened")
            done += count
        if self._manifest is not None:
            problem = self._manifest.refuses(name, DTYPE_NAMES[info.dtype], info.shape, view)
            if problem:
                raise TensorFileError(f"{self.path.name}: {problem}. {integrity.ADVICE}")
        return data.view(info.dtype).view(info.shape)

    def _read_at(self, start: int, buffer: memoryview) -> int:
        """Fill `buffer` with what is in the file from `start` on, for any thread; returns how many bytes that were."""
        if hasattr(os, "preadv"):
            return os.preadv(self._stream.fileno(), [buffer], start)
        with self.path.open("rb", buffering=0) as stream:  # Windows, where an open file cannot be replaced
            stream.seek(start)
            return stream.readinto(buffer)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _data_starts(stream: io.FileIO) -> dict[str, int]:
    """tensor name -> where its data starts in the file"""
    (size,) = struct.unpack("<Q", stream.read(8))
    header = read_object(stream.read(size), "the header", limits=HEADER)
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


LEGACY_FOLDER = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")  # Nunchaku's, beside two configs
DIFFUSERS_FILES = "diffusion_pytorch_model*.safetensors"


def folder_files(path: Path) -> list[Path]:
    """The tensor files that together are one model: Nunchaku's older folder, or the folder of a Diffusers component."""
    legacy = [path / name for name in LEGACY_FOLDER]
    return legacy if all(file.is_file() for file in legacy) else sorted(path.glob(DIFFUSERS_FILES))


class TensorFolder(TensorFile):
    """A model in several files, as one: the union of their tensors. `*.json` beside them become metadata.

    raises  TensorFileError for a folder that holds no model, and for a tensor that is there twice
    """

    def __init__(self, path: str | Path, strict: bool = True) -> None:
        self.path = Path(path)
        found = folder_files(self.path)
        if not found:
            raise TensorFileError(
                f"{self.path.name}: a folder, but neither {' and '.join(LEGACY_FOLDER)} nor {DIFFUSERS_FILES} are in "
                "it. Choose one file."
            )
        self._files: dict[str, TensorFile] = {}
        self.infos, self.metadata, self.problems = {}, {}, []
        for part in (TensorFile(file, strict) for file in found):
            for name, info in part.infos.items():
                if name in self.infos:
                    raise TensorFileError(f"{self.path.name}: {name} is in more than one of its files")
                self.infos[name], self._files[name] = info, part
            self.metadata |= part.metadata
            self.problems += [f"{part.path.name}: {problem}" for problem in part.problems]
        for name in ("config", "comfy_config"):
            file = self.path / f"{name}.json"
            if file.is_file():
                with file.open(encoding="utf-8", errors="replace") as stream:
                    self.metadata[name] = stream.read(USUAL.size + 1)  # a longer one is refused where it is used

    @property
    def has_checksums(self) -> bool:
        return all(part.has_checksums for part in self._files.values())

    def read(self, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        return self._files[name].read(name, buffer)


def open_tensors(path: str | Path, strict: bool = True) -> TensorFile:
    """The tensors of a file or of a folder of files. Raises TensorFileError."""
    return TensorFolder(path, strict) if Path(path).is_dir() else TensorFile(path, strict)


def size_on_disk(path: str | Path) -> int:
    """Bytes of a model in a file or a folder of files."""
    path = Path(path)
    return sum(file.stat().st_size for file in (folder_files(path) if path.is_dir() else [path]))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of a file name that Python keeps as lone surrogates
        return False
    return True


def _info(shape: list[int], dtype: str) -> TensorInfo:
    return TensorInfo(tuple(shape), DTYPES[dtype])


class TensorWriter:
    """Write one safetensors file with checksums, tensor after tensor, in any order.

    plan    name -> TensorInfo of everything that will be written
    extra   about how many tensors more will come through `add`: the header's room
    size    about how many bytes those will have, rather too few than too many: the disk's room
    raises  TensorFileError when a tensor is not as planned or one is missing at the end. On any exception, also one
            that comes from the `with` body, the temporary file is removed and an older file of that name is untouched.
            OSError at the start when the disk cannot hold what is planned

        >>> import tempfile
        >>> tensor = torch.arange(3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with TensorWriter(f"{folder}/x.safetensors", {"a": TensorInfo.of(tensor)}) as writer:
        ...         writer.write("a", tensor)
        ...         writer.metadata["family"] = "flux"
        ...     TensorFile(writer.path).read("a")
        tensor([0, 1, 2])
    """

    def __init__(self, path: str | Path, plan: Mapping[str, TensorInfo], extra: int = 0, size: int = 0) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._plan = dict(plan)
        self._size = size + sum(info.nbytes for info in self._plan.values())
        self._offsets: dict[str, tuple[int, int]] = {}
        self._manifest = integrity.Manifest(dict.fromkeys(self._plan, "checksum"))
        longest = dict.fromkeys(self._plan, (10**15, 10**15))  # no offset has more digits than this
        self._room = len(self._header(longest)) + METADATA_ROOM + METADATA_ROOM_PER_TENSOR * len(self._plan)
        self._room += ROOM_PER_EXTRA_TENSOR * extra

    def __enter__(self) -> "TensorWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = temporary_for(self.path)
        self._stream = self._temporary.open("wb")
        try:
            reserve(self._stream, 8 + self._room + self._size)
            self._stream.write(bytes(8 + self._room))
        except OSError:
            self._discard()
            raise
        self._end = 0
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor that was not planned."""
        if name in self._plan:
            raise TensorFileError(f"{self.path.name}: {name} comes twice")
        self._plan[name] = TensorInfo.of(tensor)
        self.write(name, tensor)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one planned tensor."""
        planned, found = self._plan.get(name), TensorInfo.of(tensor)
        if planned != found or name in self._offsets:
            raise TensorFileError(f"{self.path.name}: {name} is {found}, planned was {planned} once")
        data = integrity.bytes_of(tensor)
        self._stream.write(data)
        checksum = integrity.of_tensor(name, DTYPE_NAMES[found.dtype], found.shape, data)
        self._manifest.tensors[name] = checksum
        self._offsets[name] = (self._end, self._end + len(data))
        self._end += len(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._finish()
            self._stream.close()
            self._temporary.replace(self.path)
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # closing writes what is left, which fails again on a full disk
            self._stream.close()
        self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        missing = sorted(self._plan.keys() - self._offsets.keys())
        if missing:
            raise TensorFileError(f"{self.path.name}: {len(missing)} planned tensors never came, first {missing[0]}")
        header = self._header(self._offsets)
        if len(header) > self._room:
            self._make_room(len(header))
        self._stream.seek(0)
        self._stream.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._stream.truncate(8 + self._room + self._end)  # of what was reserved and not needed
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _make_room(self, room: int) -> None:
        """Move the data behind a header of `room` bytes, from the end backwards so that nothing is overwritten."""
        old, new = 8 + self._room, 8 + room
        self._stream.flush()
        with self._temporary.open("r+b") as file:
            for start in range((self._end - 1) // COPY_BYTES * COPY_BYTES, -1, -COPY_BYTES):
                file.seek(old + start)
                piece = file.read(min(COPY_BYTES, self._end - start))
                file.seek(new + start)
                file.write(piece)
        self._room = room

    def _header(self, offsets: Mapping[str, tuple[int, int]]) -> bytes:
        strings = {key: text for key, text in self.metadata.items() if key != integrity.KEY}
        entries: dict[str, object] = {"__metadata__": strings | {integrity.KEY: self._manifest.text(strings)}}
        for name, (start, stop) in offsets.items():
            info = self._plan[name]
            entries[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, stop],
            }
        return json.dumps(entries, separators=(",", ":")).encode()
