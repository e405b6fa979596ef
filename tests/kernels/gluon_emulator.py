"""Runs the source of a Gluon kernel on the CPU, program by program, with the tensor cores modelled lane by lane.

The kernel's own Python code is executed with another `gl`: every tensor axis is a tensor axis of torch, loads and
stores are checked against the size of their buffer, and inline PTX is interpreted, `mma.sync` by the register tables
of the PTX ISA ("Matrix Fragments"). So the indexing of the kernel is what is tested, not a copy of it.
"""

import math
import operator
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

LANES = 32
GROUP, THREAD = torch.arange(LANES) // 4, torch.arange(LANES) % 4  # groupID and threadID_in_group of the PTX tables
MMA = re.compile(r"mma\.sync\.aligned\.m(\d+)n8k(\d+)\.row\.col\.(s32|f32)\.(\w+)\.(\w+)\.(s32|f32)")


class Value:
    """A tensor as the kernel sees it: C integer arithmetic, `.to` with bitcast, None-indexing."""

    def __init__(self, data: torch.Tensor):
        self.data = data

    def __getitem__(self, index: Any) -> "Value":
        return Value(self.data[index])

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> "Value":
        return Value(self.data.contiguous().view(dtype) if bitcast else self.data.to(dtype))

    def __neg__(self) -> "Value":
        return Value(-self.data)


class Shared:
    """A block of shared memory; `load` gives what is there now."""

    def __init__(self, data: torch.Tensor):
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, index: int) -> "Shared":
        assert 0 <= index < len(self.data), "stage outside the ring"
        return Shared(self.data[index])

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        return Shared(self.data.narrow(dim, start, length))

    def load(self, layout: Any) -> Value:
        return Value(self.data.clone())


class Copies:
    """cp.async: what is copied is there when it is waited for, and may be there at once. `late` says which of both."""

    def __init__(self, late: bool):
        self.late = late
        self.open: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.groups: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def copy(self, shared: Shared, pointer: "Pointer", mask: Value | None = None) -> None:
        offset = pointer.offset.expand(shared.shape) if mask is None else pointer.offset.broadcast_to(shared.shape)
        inside = torch.ones(shared.shape, dtype=torch.bool) if mask is None else mask.data.expand(shared.shape)
        read = Language.load(Pointer(pointer.buffer, offset[inside]))
        values = torch.zeros(shared.shape, dtype=pointer.buffer.dtype)
        values[inside] = read.data
        if self.late:
            self.open.append((shared.data, values))
        else:
            shared.data.copy_(values)

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, outstanding: int) -> None:
        while len(self.groups) > outstanding:
            for target, values in self.groups.pop(0):
                target.copy_(values)


def _operation(function: Callable, swapped: bool = False) -> Callable:
    def apply(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        pair = self.data, other.data if isinstance(other, Value) else other
        return Value(function(*(reversed(pair) if swapped else pair)))

    return apply


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "lshift", "rshift", "lt", "le", "gt", "ge"):
    _function = getattr(operator, f"__{_name}__")
    setattr(Value, f"__{_name}__", _operation(_function))
    setattr(Value, f"__r{_name}__", _operation(_function, swapped=True))


@dataclass(frozen=True)
class Pointer:
    """A buffer and element offsets into it; an offset outside the buffer is an error where it is used."""

    buffer: torch.Tensor
    offset: torch.Tensor

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.buffer.dtype)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.buffer, self.offset + (other.data if isinstance(other, Value) else other))

    __radd__ = __add__


def fragment(registers: list[torch.Tensor], bits: int, tall: bool, unpack: Callable) -> torch.Tensor:
    """(rows, k) of the matrix that the lanes hold in 32-bit registers, (..., 32) each; `tall` has 16 rows, else 8.

    A lane holds row groupID, and in a tall matrix row groupID + 8 in every second register; of these rows, the 32 /
    bits neighbouring elements from threadID * 32 / bits on, and further registers the same of the next columns.
    """
    per_register = 32 // bits
    rows_per = 2 if tall else 1
    k = len(registers) // rows_per * 4 * per_register
    matrix = None
    for index, register in enumerate(registers):
        values = unpack(register)  # (..., 32, per_register)
        if matrix is None:
            matrix = torch.full((*values.shape[:-2], 8 * rows_per, k), float("nan"), dtype=torch.float64)
        row = GROUP + 8 * (index % rows_per)
        column = THREAD[:, None] * per_register + torch.arange(per_register) + index // rows_per * 4 * per_register
        matrix[..., row[:, None], column] = values.double()
    return matrix


def unpacker(kind: str) -> tuple[int, Callable[[torch.Tensor], torch.Tensor]]:
    """(bits of an element, int32 (...) -> (..., elements) float) of a PTX operand type."""

    def nibbles(register: torch.Tensor) -> torch.Tensor:
        codes = (register[..., None] >> torch.arange(0, 32, 4)) & 15
        return torch.where(codes > 7, codes - 16, codes) if kind == "s4" else codes

    def halves(register: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        return register.contiguous().view(torch.int16).unflatten(-1, (-1, 2)).view(dtype).float()

    return (4, nibbles) if kind in ("s4", "u4") else (16, halves)


def mma(instruction: str, a: list, b: list, c: list) -> list[torch.Tensor]:
    """The result registers (..., 32) of one mma.sync from the operand registers of all lanes."""
    shape = MMA.fullmatch(instruction)
    rows, k, result, a_kind, b_kind = int(shape[1]), int(shape[2]), shape[3], shape[4], shape[5]
    a_bits, a_unpack = unpacker(a_kind)
    b_bits, b_unpack = unpacker(b_kind)
    left = fragment(a, a_bits, rows == 16, a_unpack)
    right = fragment(b, b_bits, False, b_unpack)  # columns of B lie in the lanes as rows of A do
    assert left.shape[-2:] == (rows, k) and right.shape[-2:] == (8, k), f"{instruction} with {len(a)} + {len(b)}"
    assert not left.isnan().any() or a_bits == 16
    product = left @ right.transpose(-1, -2)
    results = []
    for index, start in enumerate(c):
        own = product[..., GROUP + 8 * (index // 2), THREAD * 2 + index % 2]
        if result == "s32":
            results.append((own.long() + start).to(torch.int32))
        else:
            results.append((own + start.double()).float())
    return results


def run_ptx(text: str, results: int, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    """Interpret `.reg`, `mov` and `mma.sync`; $0, $1 ... are the results, then the operands."""
    registers: dict[str, torch.Tensor] = {f"${results + index}": value for index, value in enumerate(operands)}
    for statement in text.strip().strip("{}").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        lists = [re.findall(r"[$\w]+", part) for part in re.findall(r"\{[^}]*\}|[$\w]+", rest)]
        if name == "mov.b64":
            (low, high), (source,) = lists
            words = registers[source].contiguous().view(torch.int32).unflatten(-1, (-1, 2))
            registers[low], registers[high] = words[..., 0], words[..., 1]
        elif name == "mov.b32":
            registers[lists[0][0]] = torch.tensor(int(lists[1][0], 16), dtype=torch.int32)
        elif name.startswith("mma.sync"):
            written, *read = lists
            values = mma(name, *([registers[each] for each in operand] for operand in read))
            registers.update(zip(written, values, strict=True))
        else:
            raise NotImplementedError(f"PTX statement {statement!r}")
    return [registers[f"${index}"] for index in range(results)]


class Language:
    """Stands in for `gluon.language` while one program runs."""

    int16, int32, int64 = torch.int16, torch.int32, torch.int64
    float16, bfloat16, float32 = torch.float16, torch.bfloat16, torch.float32

    def __init__(self, program: int):
        self.program = program

    def program_id(self, axis: int) -> int:
        assert axis == 0
        return self.program

    @staticmethod
    def BlockedLayout(elements: list, threads: list, warps: list, order: list) -> list[int]:  # noqa: N802
        """What one pass of all threads covers. Of what is multiplied the last two axes are the hardware's lanes."""
        assert math.prod(threads) == LANES and sorted(order) == list(range(len(order)))
        if threads[:-2] == [1] * (len(threads) - 2):
            assert threads[-2:] == [8, 4] and order[1:3] == [len(order) - 1, len(order) - 2]
        return [math.prod(each) for each in zip(elements, threads, warps, strict=True)]

    @staticmethod
    def SliceLayout(axis: int, parent: Any) -> None:  # noqa: N802
        return None

    @staticmethod
    def SwizzledSharedLayout(vec: int, per_phase: int, max_phase: int, order: list) -> None:  # noqa: N802
        return None

    @staticmethod
    def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        """Full of numbers that nobody wrote."""
        return Shared(torch.full(shape, float("nan") if dtype.is_floating_point else 0x7E7E7E7E, dtype=dtype))

    static_range = staticmethod(range)

    @staticmethod
    def expand_dims(value: Value, axis: int) -> Value:
        return Value(value.data.unsqueeze(axis))

    @staticmethod
    def arange(start: int, stop: int, layout: Any) -> Value:
        return Value(torch.arange(start, stop, dtype=torch.int32))

    @staticmethod
    def zeros(shape: list[int], dtype: torch.dtype, layout: list[int]) -> Value:
        assert shape == layout, "every element of the tile has to be in one register of one lane"
        return Value(torch.zeros(shape, dtype=dtype))

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        if not isinstance(a, Value):
            return min(a, b)
        return Value(a.data.clamp_max(b))

    @staticmethod
    def maximum(a: int, b: int) -> int:
        return max(a, b)

    @staticmethod
    def fma(a: Value, b: Value, c: Value) -> Value:
        # a product of two floats is exact in double; the sum is, wherever the kernel relies on it
        return Value((a.data.double() * b.data.double() + c.data.double()).float())

    @staticmethod
    def load(pointer: Pointer) -> Value:
        assert int(pointer.offset.min()) >= 0 and int(pointer.offset.max()) < pointer.buffer.numel(), "load outside"
        return Value(pointer.buffer.view(-1)[pointer.offset.long()])

    @staticmethod
    def store(pointer: Pointer, value: Value, mask: Value) -> None:
        offset, data, inside = torch.broadcast_tensors(pointer.offset, value.data, mask.data)
        offset = offset[inside].long()
        assert offset.unique().numel() == offset.numel(), "two lanes store to one place"
        if offset.numel():
            assert int(offset.min()) >= 0 and int(offset.max()) < pointer.buffer.numel(), "store outside"
        pointer.buffer.view(-1)[offset] = data[inside]

    @staticmethod
    def inline_asm_elementwise(
        text: str, constraints: str, operands: list[Value], dtypes: tuple, is_pure: bool, pack: int
    ) -> list[Value]:
        assert is_pure and pack == 1 and len(constraints.split(",")) == len(dtypes) + len(operands)
        words = (operand.data if isinstance(operand, Value) else torch.tensor(operand) for operand in operands)
        lanes = [each.flatten(-2) for each in torch.broadcast_tensors(*words)]
        return [Value(result.unflatten(-1, (8, 4))) for result in run_ptx(text, len(dtypes), lanes)]


def _executable(function: Any, replaced: Mapping[str, Any], cache: dict) -> Callable:
    """The kernel's Python function with the names in `replaced` replaced, and every jit function it calls too."""
    if id(function) not in cache:
        original = function.fn
        variables: dict[str, Any] = {}
        cache[id(function)] = types.FunctionType(
            original.__code__, variables, original.__name__, original.__defaults__, original.__closure__
        )
        for name, value in original.__globals__.items():
            if name in replaced:
                variables[name] = replaced[name]
            elif hasattr(value, "fn") and hasattr(value, "arg_names"):
                variables[name] = _executable(value, replaced, cache)
            elif type(value).__name__ == "constexpr":
                variables[name] = value.value
            else:
                variables[name] = value
    return cache[id(function)]


def run(kernel: Any, replaced: Mapping[str, Any], arguments: tuple, keywords: Mapping[str, Any]) -> None:
    """Run one program; a tensor among the arguments becomes a pointer to its first element."""

    def wrap(argument: Any) -> Any:
        is_tensor = isinstance(argument, torch.Tensor)
        return Pointer(argument, torch.zeros((), dtype=torch.int64)) if is_tensor else argument

    function = _executable(kernel, replaced, {})
    function(*map(wrap, arguments), **{name: wrap(argument) for name, argument in keywords.items()})


def language(program: int, programs: int, late: bool = True) -> dict[str, Any]:
    """What a kernel finds under its module's names; `late`: copies land not before they are waited for."""
    copies = Copies(late)
    return {"gl": Language(program), "async_copy": copies, "copy_async": copies.copy}


class Launcher:
    """Has the launch syntax of a kernel, `kernel[grid](...)`, and runs its programs here, one after another.

    replaced  (program, number of programs) -> names of the kernel's module and what they mean here
    """

    def __init__(self, kernel: Any, replaced: Callable[[int, int], Mapping[str, Any]] | None = None):
        self.kernel = kernel
        self.replaced = replaced or language

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **keywords: Any) -> None:
            for program in range(grid[0]):
                run(self.kernel, self.replaced(program, grid[0]), arguments, keywords)

        return launch
