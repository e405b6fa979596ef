"""Starting a kernel without Triton looking anew at every argument.

Triton compiles a variant of a kernel for the types of its arguments, how well they are aligned and the values of some,
and finds out at every launch which variant that is: in the time in which torch does a whole linear layer. Here a launch
that differs from an earlier one in none of these takes the variant that Triton took then.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes; of more Triton knows nothing
address_of = torch.Tensor.data_ptr
TWO_GB = 1 << 31  # on AMD a variant may count on a tensor that ends before


class Variant(NamedTuple):
    """A compiled kernel that was started before, what Triton starts it by, and the arguments known at compile time."""

    compiled: Any
    start: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]


_variants: dict[tuple[Any, ...], Variant] = {}
_compiling = threading.Lock()  # one at a time: Triton does not say that its compiler may run in two threads at once


def compiled() -> int:
    """Kernels that were started so far, each variant counted once"""
    return len({id(variant.compiled) for variant in list(_variants.values())})


class Launch:
    """A kernel with its compile-time arguments and launch options, to be started on tensors of the same types each time

    words  the dtype that the kernel reads a tensor as, for the first of them; None, and for the rest: its own

    Only compiled kernels are kept, no tensor and no address.
    """

    def __init__(self, kernel: Any, flags: Mapping[str, Any], words: Sequence[torch.dtype | None] = ()) -> None:
        self._kernel, self._flags, self._words = kernel, flags, words
        self._compiled = isinstance(kernel, JITFunction)  # else the interpreter's
        # no kernel is specialized on M
        self._skip = int(self._compiled and "M" in kernel.arg_names)
        self._limited = torch.version.hip is not None
        self._own: dict[tuple[Any, ...], Variant] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[torch.Tensor],
        numbers: tuple[int, ...],
        descriptors: Sequence[Any] = (),
    ) -> None:
        """kernel[grid](*descriptors, *tensors, *numbers, **flags), on the device of the first tensor

        numbers      the first one is M where the kernel has it
        descriptors  blocks and layouts follow from the flags and the types of the tensors
        """
        if not self._compiled:
            self._kernel[grid](*descriptors, *self._as_words(tensors), *numbers, **self._flags)
            return
        device, first = driver.active.get_current_device(), tensors[0]
        if first.is_cuda and first.get_device() != device:  # kernels start on the current device
            with torch.cuda.device(first.device):
                self(grid, tensors, numbers, descriptors)
            return
        addresses = list(map(address_of, tensors))
        unusual = reduce(or_, addresses) % ALIGNMENT or self._limited
        special = numbers[self._skip :]
        place = (device, special, self._unlike(tensors, addresses)) if unusual else (device, special)
        variant = self._own.get(place) or self._take(place, grid, tensors, numbers, descriptors)
        if variant is None:
            return
        compiled, start, function, metadata, constants = variant
        stream, hooks = driver.active.get_current_stream(device), knobs.runtime
        if getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True):
            compiled[grid](*descriptors, *addresses, *numbers, *constants, stream=stream)  # a profiler hears of it
            return
        start(*grid, stream, function, metadata, None, None, None, *descriptors, *addresses, *numbers, *constants)

    def _take(
        self, place: tuple[Any, ...], grid: tuple[int, int, int], tensors: Sequence[torch.Tensor], *behind: Any
    ) -> Variant | None:
        """The variant for such a launch. None if Triton had to be asked: then the kernel was started already."""
        numbers, descriptors = behind
        key = id(self._kernel), *self._flags.values(), *(tensor.dtype for tensor in tensors), place
        variant = _variants.get(key)
        if variant is not None:
            self._own[place] = variant
            return variant
        with _compiling:
            compiled = self._kernel[grid](*descriptors, *self._as_words(tensors), *numbers, **self._flags)
        if compiled is not None:  # None: a hook of Triton's took the launch
            names = self._kernel.arg_names[len(descriptors) + len(tensors) + len(numbers) :]
            constants = tuple(self._flags[name] for name in names)
            variant = Variant(compiled, compiled.run, compiled.function, compiled.packed_metadata, constants)
            self._own[place] = _variants[key] = variant
        return None

    def _as_words(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        words = (*self._words, *[None] * (len(tensors) - len(self._words)))
        return [tensor if word is None else tensor.view(word) for tensor, word in zip(tensors, words, strict=True)]

    def _unlike(self, tensors: Sequence[torch.Tensor], addresses: Sequence[int]) -> tuple[bool, ...]:
        """What sets a launch apart from one on well aligned tensors of usual size."""
        found = tuple(address % ALIGNMENT == 0 for address in addresses)
        if self._limited:
            found += tuple(tensor.untyped_storage().nbytes() < TWO_GB for tensor in tensors)
        return found
