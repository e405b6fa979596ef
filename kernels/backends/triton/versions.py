"""Which Triton is here, which one the kernels need, and which one a torch brings; nothing is imported for it.

On Linux torch brings its Triton and pins it, so nobody may ask pip for another one. On Windows it is the package
triton-windows, whose first two numbers are those of the Triton it is made from.
"""

import importlib.util
from functools import cache
from importlib.metadata import PackageNotFoundError, version

LEAST = (3, 5)  # older ones lack parts of the language that the kernels are written in
LEAST_NVFP4_SM120 = (3, 6)  # 3.5 does not compile the native NVFP4 product for sm_120
# the packages that install a module called triton: torch's own, its nightly's and ROCm's, and the one for Windows
PACKAGES = ("triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton")
# torch -> the triton that its wheel for Linux pins
BROUGHT_BY = {
    (2, 7): (3, 3),
    (2, 8): (3, 4),
    (2, 9): (3, 5),
    (2, 10): (3, 6),
    (2, 11): (3, 6),
    (2, 12): (3, 7),
    (2, 13): (3, 7),
    (2, 14): (3, 8),
    (2, 15): (3, 9),
}


@cache
def missing() -> str | None:
    """Why there is no Triton that the kernels can use, in one line, or None."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed ({advice(_installed('torch'))})"
    return too_old(LEAST)


@cache
def too_old(needed: tuple[int, int]) -> str | None:
    """Why the Triton here is not the `needed` one, or None; without a recorded version (a source build) it is."""
    found = installed()
    if found is None or _numbers(found) >= needed:
        return None
    return f"needs Triton {_text(needed)} or newer, found {found} ({advice(_installed('torch'))})"


def installed() -> str | None:
    """The version of the Triton that is here, if one is recorded"""
    return next(filter(None, map(_installed, PACKAGES)), None)


def advice(torch: str | None) -> str:
    """What to install beside a version of torch, e.g. "2.9.1+cu128".

    >>> advice("2.9.1+cu128")
    'torch 2.9 comes with Triton 3.5; on Windows: pip install "triton-windows==3.5.*"'
    """
    pair = _numbers(torch) if torch else (0, 0)
    fits = BROUGHT_BY.get(pair)
    if fits is None:
        return f"torch comes with it; on Windows install triton-windows of the version made for {torch or 'your torch'}"
    if fits < LEAST:
        enough = min(pair for pair, brought in BROUGHT_BY.items() if brought >= LEAST)
        return f"torch {_text(pair)} comes with Triton {_text(fits)}, torch {_text(enough)} is the first with enough"
    windows = f'on Windows: pip install "triton-windows=={_text(fits)}.*"'
    return f"torch {_text(pair)} comes with Triton {_text(fits)}; {windows}"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(found: str) -> tuple[int, int]:
    """(major, minor) of "3.6.0", "3.5.1.post24", "3.6.0+git9c7b1e8d" or "2.13.0a0+git"."""
    major, minor = found.split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor.split("+")[0])))


def _text(pair: tuple[int, int]) -> str:
    return ".".join(map(str, pair))
