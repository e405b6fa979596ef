"""What the kernels for Hopper need on top of gluon_emulator: TMA, barriers in shared memory, asynchronous wgmma.

One program runs as one thread of control. What the hardware may do early or late is done at one extreme or the other:
a copy lands when it is started or not before its barrier is waited for, operands are read when the instruction is
issued or not before it is waited for. A pipeline that is right gives the same result in all four combinations. A
stage that is refilled before all warpgroups have read it, or a wait that cannot end, is an error at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from svdquant_pack.tests.kernels import gluon_emulator as emulator
from svdquant_pack.tests.kernels.gluon_emulator import Pointer, Value


@dataclass
class Shared:
    """A buffer in shared memory, or one stage of a ring."""

    data: torch.Tensor
    state: dict[int, str] = field(default_factory=dict)  # of a ring: stage -> reading, read
    stage: int = 0
    turned: bool = False

    def index(self, stage: int) -> "Shared":
        return Shared(self.data[stage], self.state, stage)

    def permute(self, order: tuple[int, int]) -> "Shared":
        assert order == (1, 0)
        return Shared(self.data, self.state, self.stage, not self.turned)

    def matrix(self) -> torch.Tensor:
        return (self.data.T if self.turned else self.data).double()


@dataclass
class Barrier:
    """Counts completed phases; a phase ends when the expected bytes have been copied."""

    completed: int = 0
    bytes_missing: int | None = None
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def land(self) -> None:
        for target, source in self.copies:
            target.copy_(source)
        self.copies.clear()

    def complete(self) -> None:
        self.land()
        self.completed += 1
        self.bytes_missing = None


@dataclass(frozen=True)
class Descriptor:
    """Stands in for TensorDescriptor: copies blocks, with zeros for what lies outside the tensor."""

    base: torch.Tensor
    block: list[int]
    layout: Any

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor, block: list[int], layout: Any) -> "Descriptor":
        assert tensor.stride(1) == 1 and tensor.stride(0) * tensor.itemsize % 16 == 0
        return cls(tensor, block, layout)

    def read(self, corner: list[int]) -> torch.Tensor:
        block = torch.zeros(self.block, dtype=self.base.dtype)
        inside = self.base[corner[0] :, corner[1] :][: self.block[0], : self.block[1]]
        block[: inside.shape[0], : inside.shape[1]] = inside
        return block


class Machine:
    """The asynchronous parts of one multiprocessor."""

    def __init__(self, copies_late: bool, reads_late: bool):
        self.copies_late, self.reads_late = copies_late, reads_late
        self.barriers: dict[int, Barrier] = {}
        self.flying: list[tuple[Shared, Shared, Value]] = []
        self.buffers: list[Shared] = []

    def expect(self, barrier: Shared, count: int) -> None:
        state = self.barriers[barrier.stage]
        assert state.bytes_missing is None, "a barrier is armed again before its phase has ended"
        state.bytes_missing = count

    def copy(self, descriptor: Descriptor, corner: list[int], barrier: Shared, target: Shared) -> None:
        assert target.stage not in target.state, f"a stage is refilled that is still {target.state[target.stage]}"
        state = self.barriers[barrier.stage]
        source = descriptor.read(corner)
        state.bytes_missing -= source.nbytes
        assert state.bytes_missing >= 0, "more bytes arrive than the barrier expects"
        state.copies.append((target.data, source))
        if not self.copies_late:
            state.land()
            if state.bytes_missing == 0:
                state.complete()

    def wait(self, barrier: Shared, parity: int) -> None:
        state = self.barriers[barrier.stage]
        if state.completed & 1 != parity:
            return  # the phase before this one had that parity: it has ended, the hardware does not wait
        assert state.bytes_missing == 0, "waits for a phase that nothing will end"
        state.complete()

    def multiply(self, a: Shared, b: Shared, acc: Value, is_async: bool = False) -> Value:
        result = Value(acc.data.clone())
        for operand in (a, b):
            operand.state[operand.stage] = "being read"
        self.flying.append((a, b, result))
        if not self.reads_late:
            self.add(a, b, result)
        if not is_async:
            self.wait_products(0, (result,))
        return result

    @staticmethod
    def add(a: Shared, b: Shared, result: Value) -> None:
        result.data += (a.matrix() @ b.matrix()).to(result.data.dtype)

    def wait_products(self, allowed: int, deps: tuple[Value, ...]) -> Value:
        while len(self.flying) > allowed:
            a, b, result = self.flying.pop(0)
            if self.reads_late:
                self.add(a, b, result)
                for _, _, later in self.flying:  # a later group goes on from this one's sum
                    later.data.copy_(result.data)
            for operand in (a, b):
                if not any(operand.state is o.state and operand.stage == o.stage for f in self.flying for o in f[:2]):
                    operand.state[operand.stage] = "read by this warpgroup alone"
        return deps[0]

    def block_barrier(self) -> None:
        for buffer in self.buffers:
            for stage in [stage for stage, state in buffer.state.items() if state != "being read"]:
                del buffer.state[stage]


class Language(emulator.Language):
    """`gluon.language` on one Machine."""

    int8 = torch.int8
    static_range = range

    def __init__(self, program: int, programs: int, machine: Machine):
        super().__init__(program)
        self.programs, self.machine = programs, machine

    def num_programs(self, axis: int) -> int:
        return self.programs

    @staticmethod
    def to_tensor(value: int) -> int:
        return value

    @staticmethod
    def NVMMADistributedLayout(*arguments: Any) -> None:  # noqa: N802
        return None

    @staticmethod
    def convert_layout(value: Value, layout: Any) -> Value:
        return value

    @staticmethod
    def zeros(shape: list[int], dtype: torch.dtype, layout: Any) -> Value:
        return Value(torch.zeros(shape, dtype=dtype))

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        poison = float("nan") if dtype.is_floating_point else 99
        buffer = Shared(torch.full(shape, poison, dtype=dtype))
        self.machine.buffers.append(buffer)
        return buffer

    @staticmethod
    def load(pointer: Pointer, mask: Value | None = None, other: float = 0.0) -> Value:
        if mask is None:
            return emulator.Language.load(pointer)
        inside = Pointer(pointer.buffer, torch.where(mask.data, pointer.offset, 0))
        return Value(torch.where(mask.data, emulator.Language.load(inside).data, other))


def replaced(program: int, programs: int, copies_late: bool, reads_late: bool) -> Mapping[str, Any]:
    """The names a Hopper kernel imports, and what they mean here."""
    machine = Machine(copies_late, reads_late)

    def init(barrier: Shared, count: int) -> None:
        assert count == 1
        machine.barriers[barrier.stage] = Barrier()

    def invalidate(barrier: Shared) -> None:
        state = machine.barriers[barrier.stage]
        assert state.bytes_missing is None and not machine.flying, "the program ends with copies or products under way"

    return {
        "gl": Language(program, programs, machine),
        "mbarrier": SimpleNamespace(
            init=init,
            invalidate=invalidate,
            expect=machine.expect,
            wait=machine.wait,
            MBarrierLayout=lambda: None,
        ),
        "copy_block": machine.copy,
        "block_barrier": machine.block_barrier,
        "fence_async_shared": lambda: None,
        "warpgroup_mma": machine.multiply,
        "warpgroup_mma_init": lambda value: value,
        "warpgroup_mma_wait": lambda allowed, deps: machine.wait_products(allowed, deps),
    }
