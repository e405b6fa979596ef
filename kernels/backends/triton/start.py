"""Starting a kernel without Triton looking anew at every argument.

Triton compiles a variant of a kernel for the types of its arguments, how well they are aligned and the values of some,
and finds out at every launch which variant that is: in the time in which torch does a whole linear layer. Here a launch
that differs from an earlier one in none of these takes the variant that Triton took then.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes; of more Triton knows nothing
TWO_GB = 1 << 31  # on AMD a variant may count on a tensor that ends before


class Variant(NamedTuple):
    """A compiled kernel, and the compile-time arguments that stand behind the others."""

    compiled: Any
    constants: tuple[Any, ...]


_variants: dict[tuple[Any, ...], Variant] = {}


class Launch:
    """A kernel with its compile-time arguments and launch options, to be started on tensors of the same types each time

    Only compiled kernels are kept, no tensor and no address.
    """

    def __init__(self, kernel: Any, flags: Mapping[str, Any]) -> None:
        self._kernel, self._flags = kernel, flags
        self._compiled = isinstance(kernel, JITFunction)  # else the interpreter's
        self._own: dict[tuple[Any, ...], Variant] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[torch.Tensor],
        numbers: tuple[int, ...],
        descriptors: Sequence[Any] = (),
    ) -> None:
        """kernel[grid](*descriptors, *tensors, *numbers, **flags), on the device of the first tensor

        numbers      the first one is M where the kernel has it: no kernel is specialized on it
        descriptors  blocks and layouts follow from the flags and the types of the tensors
        """
        if not self._compiled:
            self._kernel[grid](*descriptors, *tensors, *numbers, **self._flags)
            return
        device, first = driver.active.get_current_device(), tensors[0]
        if first.is_cuda and first.get_device() != device:  # kernels start on the current device
            with torch.cuda.device(first.device):
                self(grid, tensors, numbers, descriptors)
            return
        addresses = [tensor.data_ptr() for tensor in tensors]
        behind = len(descriptors) + len(tensors)
        special = numbers[1:] if self._kernel.arg_names[behind] == "M" else numbers
        place = device, special, _unusual(tensors, addresses)
        variant = self._own.get(place)
        if variant is None:
            key = id(self._kernel), *place, *self._flags.values(), *(tensor.dtype for tensor in tensors)
            variant = _variants.get(key)
            if variant is None:
                compiled = self._kernel[grid](*descriptors, *tensors, *numbers, **self._flags)
                if compiled is not None:  # None: a hook of Triton's took the launch
                    names = self._kernel.arg_names[behind + len(numbers) :]
                    variant = Variant(compiled, tuple(self._flags[name] for name in names))
                    self._own[place] = _variants[key] = variant
                return
            self._own[place] = variant
        compiled, constants = variant
        compiled[grid](
            *descriptors,
            *addresses,
            *numbers,
            *constants,
            stream=driver.active.get_current_stream(device),
        )


def _unusual(tensors: Sequence[torch.Tensor], addresses: Sequence[int]) -> tuple[bool, ...]:
    """What sets a launch apart from one on well aligned tensors of usual size."""
    found: tuple[bool, ...] = ()
    if reduce(or_, addresses) % ALIGNMENT:
        found = tuple(address % ALIGNMENT == 0 for address in addresses)
    if torch.version.hip:
        found += tuple(tensor.untyped_storage().nbytes() < TWO_GB for tensor in tensors)
    return found
