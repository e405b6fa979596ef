"""A file's bytes at a place, copied: nothing is mapped, because a mapped file that is cut short kills the process."""

import os
from pathlib import Path

import torch

from .tensor_file import TensorFileError


class RawFile:
    """`read(start, size, what)`: those bytes as an uint8 vector.

    raises  TensorFileError that names `what` where the file ends before them
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stream = path.open("rb", buffering=0)  # this very file, whatever its name stands for later
            self.size = os.fstat(self._stream.fileno()).st_size
        except OSError as error:
            raise TensorFileError(f"{path}: cannot be opened ({error.strerror})") from error

    def read(self, start: int, size: int, what: str) -> torch.Tensor:
        if start < 0 or size < 0 or start + size > self.size:
            raise TensorFileError(
                f"{self.path.name}: {what} would be bytes {start:,} to {start + size:,} of {self.size:,}. The file is "
                "truncated or damaged: compare its size with the original and download it again"
            )
        data = torch.empty(size, dtype=torch.uint8)
        view, done = data.numpy().data, 0
        while done < size:
            count = self._read_at(start + done, view[done:])
            if not count:
                raise TensorFileError(f"{self.path.name}: {what} ends early; the file was changed after it was opened")
            done += count
        return data

    def _read_at(self, start: int, buffer: memoryview) -> int:
        try:
            if hasattr(os, "preadv"):
                return os.preadv(self._stream.fileno(), [buffer], start)
            with self.path.open("rb", buffering=0) as stream:  # Windows
                stream.seek(start)
                return stream.readinto(buffer)
        except OSError as error:
            raise TensorFileError(f"{self.path.name}: cannot be read ({error.strerror})") from error
