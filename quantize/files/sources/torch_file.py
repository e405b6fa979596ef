"""What `torch.save` has written: `.ckpt`, `.pt`, `.pth`, `.bin`. A zip archive of a pickle and the tensors' bytes.

The pickle is looked at by a child process (`unpickle.py`), which says where each tensor lies; the bytes are read here,
from the file itself. No object of the pickle comes into this process.
"""

import math
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....kernels.bounded_json import HEADER, JsonError, read_json
from .. import unpickle
from ..raw_file import RawFile
from ..tensor_file import DTYPE_NAMES, TensorFile, TensorFileError, TensorInfo
from ..tensors import TensorView
from . import SourceKind

LARGEST_PICKLE = 1 << 26  # bytes; that of a model with 10,000 tensors has two million
SECONDS = 600  # until the child has to be done; to import torch from a cold disk takes most of it
FIRST = b"\x80\x02\x8a\n"  # of a file before torch 1.6: a pickle, then the tensors
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}
SAVE = "Save it as .safetensors: load it where it was made and save its state_dict with safetensors.torch.save_file"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its storage from byte `start` on, its numbers there by `offset` and `stride`."""

    start: int
    offset: int
    stride: tuple[int, ...]
    info: TensorInfo

    @property
    def span(self) -> int:
        """Numbers from the first to the last."""
        if 0 in self.info.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.info.shape, self.stride, strict=True))


def open_file(path: Path) -> TensorFile:
    """Raises TensorFileError for a pickle that holds more than tensors, and for a damaged archive."""
    file = RawFile(path)
    if not zipfile.is_zipfile(path) and bytes(file.read(0, len(FIRST), "its start").numpy()) == FIRST:
        raise TensorFileError(f"{path.name}: is of a torch before 1.6, whose files are not opened. {SAVE}")
    _check_archive(path)
    stored = dict(_place(path, entry) for entry in _entries(path))
    if not stored:
        raise TensorFileError(f"{path.name}: holds no tensor by name. {SAVE}")
    for name, place in stored.items():
        item = place.info.dtype.itemsize
        if place.start + (place.offset + place.span) * item > file.size:
            raise TensorFileError(f"{path.name}: {name} ends behind the end of the file; download it again")

    def read(name: str) -> torch.Tensor:
        place = stored[name]
        item = place.info.dtype.itemsize
        raw = file.read(place.start + place.offset * item, place.span * item, name)
        return raw.view(place.info.dtype).as_strided(place.info.shape, place.stride).contiguous()

    return TensorView(path, {name: place.info for name, place in stored.items()}, read)


def _check_archive(path: Path) -> None:
    """Nothing compressed, a pickle of a sane size, numbers in the order of this machine's bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            order = next((archive.read(entry) for entry in entries if _is_order(entry)), sys.byteorder.encode())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise TensorFileError(
            f"{path.name}: not a whole file of torch.save ({error}). It may be truncated: compare its size with the "
            "original and download it again"
        ) from error
    if len(pickles) != 1 or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise TensorFileError(f"{path.name}: a zip archive, but not one of torch.save. Give the model's own file")
    if pickles[0].file_size > LARGEST_PICKLE:
        raise TensorFileError(
            f"{path.name}: its pickle has {pickles[0].file_size:,} bytes, at most {LARGEST_PICKLE:,} are read. {SAVE}"
        )
    if order.strip() != sys.byteorder.encode():
        raise TensorFileError(f"{path.name}: was written on a machine with another order of bytes. {SAVE}")


def _is_order(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.endswith("/byteorder") and entry.file_size < 64


def _entries(path: Path) -> list[Any]:
    """What the child says of the file."""
    if not sys.executable:
        raise TensorFileError(f"{path.name}: there is no Python to start for it. {SAVE}")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        command = [sys.executable, unpickle.__file__, str(path)]
        try:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=error, timeout=SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired as late:
            raise TensorFileError(f"{path.name}: its pickle was not read within {SECONDS} seconds. {SAVE}") from late
        out.seek(0)
        error.seek(0)
        text, reason = out.read(HEADER.size + 1), error.read(1 << 16).decode("utf-8", "replace").strip()
    if code:
        last = (reason.splitlines() or [f"it ended with code {code}"])[0]
        raise TensorFileError(f"{path.name}: its pickle holds more than tensors, or is damaged ({last:.300}). {SAVE}")
    try:
        found = read_json(text, f"{path.name}: what was found in its pickle", HEADER)
    except JsonError as problem:
        raise TensorFileError(f"{problem}. {SAVE}") from problem
    return found if isinstance(found, list) else []


def _place(path: Path, entry: Any) -> tuple[str, Stored]:
    """Checked: the child has read what somebody else wrote."""
    if not isinstance(entry, list) or [type(part) for part in entry[:4]] != [str, str, list, list] or len(entry) != 6:
        raise TensorFileError(f"{path.name}: what its pickle says of a tensor is {entry!r:.80}. {SAVE}")
    name, dtype, shape, stride, offset, start = entry
    if dtype not in DTYPES:
        raise TensorFileError(f"{path.name}: {name} is {dtype}, needed one of {', '.join(sorted(DTYPES))}. {SAVE}")
    numbers = (*shape, *stride, offset, start)
    if not all(isinstance(number, int) and 0 <= number < 1 << 62 for number in numbers) or len(shape) != len(stride):
        raise TensorFileError(f"{path.name}: {name} has shape {shape} and strides {stride}, which is none. {SAVE}")
    place = Stored(start, offset, tuple(stride), TensorInfo(tuple(shape), DTYPES[dtype]))
    if math.prod(shape) > place.span:  # expanded: one number stands for many
        raise TensorFileError(
            f"{path.name}: {name} says {math.prod(shape):,} numbers and stores {place.span:,}. {SAVE}"
        )
    return name, place


def _is_it(path: Path, head: bytes) -> bool:
    return head.startswith((b"PK\x03\x04", FIRST)) and head[8:9] != b"{"


KIND = SourceKind("torch", _is_it, open_file)
