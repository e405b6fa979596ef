"""The child process that looks into a pickle: run as a file, it prints where each tensor lies, as JSON.

    python unpickle.py FILE  ->  [[name, dtype, shape, stride, storage offset, first byte of the storage], ..]

It is the one place of the pack where a pickle is looked at: by `torch.load(weights_only=True)`, which builds tensors
and plain containers only, with tensors that have no memory, and in a process of its own whose memory, time and output
have limits. What it prints is not trusted either.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

MEMORY = 1 << 30  # bytes on top of what torch itself needs
SECONDS = 120  # of CPU, torch's own import included
NESTED = ("state_dict",)


def limit() -> None:
    """Of memory and time, where the system has limits: not on Windows."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        now = Path("/proc/self/statm").read_text().split()[0]  # pages of address space
        used = int(now) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def state_dict_of(loaded: Any) -> dict[Any, Any]:
    """The tensors by name: what was saved, its `state_dict`, or the one dictionary in it."""
    for key in NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            return loaded[key]
    if isinstance(loaded, dict) and len(loaded) == 1:
        (only,) = loaded.values()
        return only if isinstance(only, dict) else loaded
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, needed tensors by name")
    return loaded


def places(path: str) -> list[list[Any]]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    limit()
    with FakeTensorMode():
        tensors = state_dict_of(torch.load(path, map_location="cpu", weights_only=True))
    found = []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            continue  # an epoch, say
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        shape, stride = list(tensor.shape), list(tensor.stride())
        found.append([name, str(tensor.dtype).removeprefix("torch."), shape, stride, tensor.storage_offset(), start])
    return found


def main(path: str) -> int:
    try:
        found = places(path)
    except Exception as error:  # of whatever kind: the parent says it in one line
        sys.stderr.write(f"{type(error).__name__}: {error}")
        return 1
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are not meant
    sys.exit(main(sys.argv[1]))
