"""Reads machine code: NVIDIA SASS as nvdisasm prints it, AMD assembly as LLVM prints it. Needs no GPU and no triton."""

import re
from collections import Counter
from dataclasses import dataclass

TENSOR_CORE = re.compile(r"(HMMA|IMMA|QMMA|OMMA|BMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA|v_mfma|v_wmma|v_swmmac)")
KINDS = {  # first match wins
    "tensor": TENSOR_CORE,
    "float": re.compile(
        r"FADD|FMUL|FFMA|HFMA2|H(ADD|MUL)2|FMNMX|FSEL|FSETP|MUFU|v_\w*(fma|fmac|add|sub|mul|max|min)_f"
    ),
    "convert": re.compile(r"I2F|F2I|F2F|I2I|v_cvt"),
    "memory": re.compile(r"LD|ST|UTMA|UBLKCP|RED|ATOM|MATCH|ds_|buffer_|global_|scratch_|flat_"),
    "sync": re.compile(r"BAR|DEPBAR|SYNCS|WARP|FENCE|MEMBAR|s_wait|s_barrier"),
    "integer": re.compile(r"IADD|IMAD|LOP3|SHF|PRMT|LEA|ISETP|SEL|VIADD|IMNMX|VIMNMX|SGXT|PLOP3|v_(?!mov|accvgpr|nop)"),
}
SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
AMD_LINE = re.compile(r"\s+((?:v|s|ds|buffer|global|scratch|flat)_\w+)\s*([^;]*)")
LABEL = re.compile(r"\s*(\.L\w+|[$\w]+):")
ENDS = ("EXIT", "RET", "s_endpgm", "s_setpc")
# subroutines of ordinary arithmetic (a division off its fast path) and of the checks around sm_100's tensor memory
ORDINARY = re.compile(r"(div|rcp|sqrt|rsqrt|rem)_|guardrail", re.IGNORECASE)


@dataclass(frozen=True)
class Instruction:
    """One line of machine code; `target` is the label a branch or call names."""

    mnemonic: str
    operands: str
    predicated: bool
    target: str | None


@dataclass(frozen=True)
class Code:
    """Instructions in order, and the index every label stands before."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> Code:
    """Instructions and labels of one kernel, SASS or AMD assembly (told apart line by line)."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif sass := SASS_LINE.match(line):
            named = re.search(r"`\((\S+?)\)", sass[3])
            instructions.append(Instruction(sass[2], sass[3], bool(sass[1]), named and named[1]))
        elif amd := AMD_LINE.match(line):
            named = re.search(r"(\.LBB\w+)", amd[2]) if "branch" in amd[1] else None
            instructions.append(Instruction(amd[1], amd[2], amd[1].startswith("s_cbranch"), named and named[1]))
    return Code(tuple(instructions), labels)


def is_branch(instruction: Instruction) -> bool:
    """Whether it jumps; the assembler also writes a jump out of a loop as a call of a plain label."""
    if instruction.mnemonic.startswith("CALL"):
        return (instruction.target or "").startswith(".L_x")
    return instruction.mnemonic.startswith(("BRA", "s_branch", "s_cbranch"))


def _blocks(code: Code) -> tuple[list[int], dict[int, list[int]]]:
    """(first instruction of every basic block, {block start: starts of its successors})"""
    total = len(code.instructions)
    starts = {0, *(index for index in code.labels.values() if index < total)}
    for index, instruction in enumerate(code.instructions):
        if (is_branch(instruction) or instruction.mnemonic.startswith(ENDS)) and index + 1 < total:
            starts.add(index + 1)
    order = sorted(starts)
    successors = {}
    for start, following in zip(order, [*order[1:], total], strict=True):
        last, after = code.instructions[following - 1], []
        if is_branch(last) and last.target in code.labels and code.labels[last.target] < total:
            after.append(code.labels[last.target])
        conditional = last.predicated or ("U" in last.operands.split(",")[0] and last.mnemonic.startswith("BRA.U"))
        falls = not (is_branch(last) or last.mnemonic.startswith(ENDS)) or conditional
        if falls and following < total:
            after.append(following)
        successors[start] = after
    return order, successors


def _dominators(successors: dict[int, list[int]]) -> dict[int, set[int]]:
    """{block: blocks on every path from the entry to it}, of the blocks that the entry reaches."""
    reached, stack = [], [0]
    seen = {0}
    while stack:
        block = stack.pop()
        reached.append(block)
        new = [after for after in successors[block] if after not in seen]
        seen.update(new)
        stack.extend(new)
    before = {block: [other for other in reached if block in successors[other]] for block in reached}
    dominators = {block: set(reached) for block in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in reached[1:]:
            new = set.intersection(*(dominators[other] for other in before[block])) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def loops(code: Code) -> list[tuple[Instruction, ...]]:
    """The natural loops: everything that reaches a jump back to a block without leaving that block's reach.

    A loop's waits that the assembler has moved behind the kernel's end belong to it, and nothing else there does.
    """
    if not code.instructions:
        return []
    order, successors = _blocks(code)
    ends = dict(zip(order, [*order[1:], len(code.instructions)], strict=True))
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}
    for block in dominators:
        for head in successors[block]:
            if head in dominators[block]:
                body = bodies.setdefault(head, {head})
                stack = [block]
                while stack:
                    inside = stack.pop()
                    if inside not in body:
                        body.add(inside)
                        stack.extend(other for other in dominators if inside in successors[other])
    return [
        tuple(line for block in sorted(body) for line in code.instructions[block : ends[block]])
        for body in bodies.values()
    ]


def main_loop(code: Code, expected: str = "") -> tuple[Instruction, ...]:
    """The innermost loop with the most tensor-core instructions of the expected kind, of equal ones the longest.

    Without any, the longest loop; without a loop, all.
    """
    found = loops(code)
    if not found:
        return code.instructions
    with_tensor = [loop for loop in found if tensor_core(loop)]
    if not with_tensor:
        return max(found, key=len)
    innermost = _innermost(with_tensor)

    def expected_instructions(loop: tuple[Instruction, ...]) -> int:
        return sum(count for mnemonic, count in tensor_core(loop).items() if expected in mnemonic)

    return max(innermost, key=lambda loop: (expected_instructions(loop), len(loop)))


def innermost_loops(code: Code) -> list[tuple[Instruction, ...]]:
    """The loops that hold no other loop."""
    return _innermost(loops(code))


def _innermost(found: list[tuple[Instruction, ...]]) -> list[tuple[Instruction, ...]]:
    lines = [{id(line) for line in loop} for loop in found]
    return [loop for loop, own in zip(found, lines, strict=True) if not any(other < own for other in lines)]


def tensor_core(lines: tuple[Instruction, ...]) -> Counter[str]:
    """{mnemonic: count} of the tensor-core instructions."""
    return Counter(line.mnemonic for line in lines if TENSOR_CORE.match(line.mnemonic))


def kinds(lines: tuple[Instruction, ...]) -> Counter[str]:
    """{kind: count} over KINDS; the rest is "other"."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts[next((kind for kind, pattern in KINDS.items() if pattern.match(line.mnemonic)), "other")] += 1
    return counts


def emulation_calls(code: Code) -> list[str]:
    """Subroutines that are called and are not ordinary ones: instructions the GPU does not have."""
    called = (
        line.target or "?" for line in code.instructions if line.mnemonic.startswith("CALL") and not is_branch(line)
    )
    return sorted({name for name in called if not ORDINARY.search(name)})


def leaves_in_flight(lines: tuple[Instruction, ...]) -> bool:
    """Whether some wait for tensor-core instructions lets at least one group stay in flight (sm_90)."""
    waits = (line.operands for line in lines if line.mnemonic.startswith("WARPGROUP.DEPBAR"))
    return any(int(wait.split(",")[-1].strip(), 16) > 0 for wait in waits)
