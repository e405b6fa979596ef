"""What machine code says of memory: how wide its loads are, how soon they are needed, how many blocks share an SM.

Of NVIDIA code. Needs no GPU and no triton.
"""

import re
from dataclasses import dataclass

from .machine_code import TENSOR_CORE, Code, Instruction, innermost_loops, kinds, tensor_core

GLOBAL_LOAD = re.compile(r"(LDG|LD)\.E\b")  # into registers; asynchronous copies (LDGSTS, UTMALDG) have no such reader
NARROW = re.compile(r"\.[US](8|16)\b")
REGISTER = re.compile(r"\bR(\d+)\b")
WRITES_NOTHING = re.compile(r"ST|RED|BAR|BRA|EXIT|DEPBAR|CCTL|UTMA|MEMBAR|FENCE|SYNCS|WARP|NOP")
WIDTHS = ((re.compile(r"\.128\b"), 4), (re.compile(r"\.(64|WIDE)\b|^CS2R"), 2), (re.compile(r"MMA"), 4))
REGISTERS = 65536  # per SM, 32 bits each; the same from sm_75 on
REGISTER_STEP = 256  # a warp is given registers in such steps
KIB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """What one SM has for its blocks (CUDA programming guide, table of compute capabilities); shared in bytes."""

    warps: int
    blocks: int
    shared: int
    reserved: int = KIB  # shared memory that every block takes beside its own


SM = {
    "sm_75": Multiprocessor(32, 16, 64 * KIB, reserved=0),
    "sm_80": Multiprocessor(64, 32, 164 * KIB),
    "sm_86": Multiprocessor(48, 16, 100 * KIB),
    "sm_89": Multiprocessor(48, 24, 100 * KIB),
    "sm_90": Multiprocessor(64, 32, 228 * KIB),
    "sm_100": Multiprocessor(64, 32, 228 * KIB),
    "sm_120": Multiprocessor(48, 24, 100 * KIB),
}
TENSOR_MEMORY = 512  # columns per SM, on sm_100 alone


def resident_blocks(target: str, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """Blocks that one SM runs at a time: the least of what warps, registers, shared and tensor memory allow.

    >>> resident_blocks("sm_120", registers=200, shared=33792, warps=8)
    1
    >>> resident_blocks("sm_120", registers=128, shared=33792, warps=8)
    2
    """
    sm = SM[target]
    each = -(-registers * 32 // REGISTER_STEP) * REGISTER_STEP
    fitting = REGISTERS // 4 // each * 4  # the four schedulers have their own registers, and a warp stays with one
    limits = [sm.blocks, sm.warps // warps, fitting // warps, sm.shared // max(1, shared + sm.reserved)]
    if tensor_memory:
        limits.append(TENSOR_MEMORY // tensor_memory)
    return min(limits)


def narrow_loads(loop: tuple[Instruction, ...]) -> int:
    """Global loads of fewer than 4 bytes a thread: as many requests as wide ones, and none of them asynchronous"""
    return sum(bool(GLOBAL_LOAD.match(line.mnemonic) and NARROW.search(line.mnemonic)) for line in loop)


def early_loads(loop: tuple[Instruction, ...]) -> int:
    """Global loads that the same pass of the loop needs before its first tensor-core instruction: each is waited for"""
    first = next((index for index, line in enumerate(loop) if TENSOR_CORE.match(line.mnemonic)), 0)
    return sum(
        bool(GLOBAL_LOAD.match(line.mnemonic)) and _read(_written(line), loop[index + 1 : first])
        for index, line in enumerate(loop[:first])
    )


def _written(line: Instruction) -> set[int]:
    """Numbers of the registers that an instruction writes"""
    operands = line.operands.split(",")
    if WRITES_NOTHING.match(line.mnemonic):
        return set()
    found = next((REGISTER.search(operand) for operand in operands if not re.match(r"\s*!?U?P[\dT]", operand)), None)
    if found is None:
        return set()
    width = next((width for pattern, width in WIDTHS if pattern.search(line.mnemonic)), 1)
    return set(range(int(found[1]), int(found[1]) + width))


def _read(registers: set[int], lines: tuple[Instruction, ...]) -> bool:
    """Whether one of the lines reads one of the registers before it is written anew"""
    left = set(registers)
    for line in lines:
        operands = line.operands
        if not WRITES_NOTHING.match(line.mnemonic):
            target = REGISTER.search(operands)
            operands = operands[target.end() :] if target else operands
        if left & {int(number) for number in REGISTER.findall(operands)}:
            return True
        left -= _written(line)
    return False


def instructions_per_element(code: Code, elements: int) -> float:
    """Of a kernel whose threads handle so many elements in one pass of each of its innermost loops

    A loop that only multiplies belongs to other programs, which quantize nothing.
    """
    found = [loop for loop in innermost_loops(code) if kinds(loop)["float"] or not tensor_core(loop)]
    return (sum(map(len, found)) if found else len(code.instructions)) / elements
