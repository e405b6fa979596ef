"""Let torchvision and torchaudio, built for CUDA, be imported beside a CPU build of torch. For tests only.

The registry serves both as CUDA builds alone. On a machine without CUDA their compiled parts do not load; most of
each package is plain Python and works, but the import itself fails. `install` adds an import hook for the two modules
where it fails. Where the compiled parts do load (a CUDA torch, a matching CPU build) the hook changes nothing.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

# torchvision describes these operators to torch at import, and cannot unless their schemas exist
TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries = []  # torch forgets a schema when the library object that declared it dies


def _loads(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def _before_torchvision(module: ModuleType) -> None:
    import torch  # late: ComfyUI wants to set torch's environment before its first import

    folder = Path(module.__spec__.origin).parent
    if any(_loads(library) for library in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd"))):
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in TORCHVISION_SCHEMAS:
        library.define(schema)
    _libraries.append(library)


def _after_torchaudio(module: ModuleType) -> None:
    load = module._load_lib

    def load_or_go_without(name: str) -> bool:
        try:
            return load(name)
        except OSError:
            return False  # torchaudio's own answer for "there is no such file": it then runs as plain Python

    module._load_lib = load_or_go_without


def _nothing(module: ModuleType) -> None:
    """The other half of a hook that has one half only."""


HOOKS: dict[str, tuple[Callable[[ModuleType], None], Callable[[ModuleType], None]]] = {
    "torchvision": (_before_torchvision, _nothing),
    "torchaudio._extension.utils": (_nothing, _after_torchaudio),
}


class _HookedLoader(Loader):
    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        before, after = HOOKS[module.__name__]
        module.__spec__.loader = module.__loader__ = self.inner  # whoever looks later sees an ordinary module
        before(module)
        self.inner.exec_module(module)
        after(module)


class _HookedFinder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in HOOKS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _HookedLoader(spec.loader)
        return spec


def install() -> None:
    """Add the hook, once. Call it before anything imports torchvision or torchaudio."""
    if not any(isinstance(finder, _HookedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _HookedFinder())
