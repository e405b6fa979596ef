"""No variant of a kernel computes for a user before it has computed a small product right on that device.

A backend's self-test runs one layer. These kernels are compiled in several variants, and each is checked by itself when
it is first needed; the error it raises makes the dispatch turn the backend off.
"""

from collections.abc import Callable, Hashable

import torch

# relative error of a product whose result is rounded to 16 bit: 0.004; a wrong lane, scale or stage gives 0.1 and more
TOLERANCE = 0.01
_right: set[Hashable] = set()


def once(variant: tuple[Hashable, ...], check: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Run `check` -> (found, wanted) the first time `variant` (device and compile-time choices) is used.

    raises  RuntimeError if they differ
    """
    if variant in _right:
        return
    found, wanted = check()
    error = ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"variant {variant} is wrong by {error:.3g} of the result, allowed are {TOLERANCE}")
    _right.add(variant)


def numbers(device: torch.device, seed: int) -> Callable[..., torch.Tensor]:
    """Random tensors on `device`, the same everywhere: f(low, high, *shape, dtype); integers below `high` or floats."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:
            return (torch.rand(*shape, generator=generator) * (high - low) + low).to(device, dtype)
        return torch.randint(int(low), int(high), shape, generator=generator).to(device, dtype)

    return draw
