"""How the files of a 16-bit model lie. KINDS is what lies in this folder; a new kind is one new file with `KIND`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ....kernels.discover import modules
from ..tensor_file import TensorFile

HEAD = 16  # bytes of a file that tell what it is


@dataclass(frozen=True)
class SourceKind:
    """One way to lie.

    name   as shown to the user
    is_it  (path, first bytes of the file, b"" of a folder) -> whether it is of this kind
    open   path -> its tensors under their own names. Raises TensorFileError that says what to do
    """

    name: str
    is_it: Callable[[Path, bytes], bool]
    open: Callable[[Path], TensorFile]


def open_source(path: str | Path) -> TensorFile:
    """The tensors of a model in whatever form, from headers alone. What no kind claims is read as safetensors.

    raises  TensorFileError
    """
    path = Path(path)
    head = _head(path)
    found = next((kind for kind in KINDS.values() if kind.is_it(path, head)), None)
    return (found or KINDS["safetensors"]).open(path)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(HEAD)
    except OSError:  # a folder, or what is said when it is opened
        return b""


KINDS: dict[str, SourceKind] = {module.KIND.name: module.KIND for module in modules(sys.modules[__name__])}
