"""A plug-in folder is its own registry: put a file in, it exists."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType


def modules(package: ModuleType) -> Iterator[ModuleType]:
    """Import and yield every module of `package`, in name order.

    Names are taken relative to the package's own `__name__`, so the pack works under any folder name.
    """
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        yield importlib.import_module(f"{package.__name__}.{info.name}")
