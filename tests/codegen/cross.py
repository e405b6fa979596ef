"""Compiles a kernel for any GPU, on a machine that has none, and measures the machine code.

Uses the assembler and disassembler inside the triton wheel; a driver is not needed.
"""

import contextlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import layout, machine_code
from .cases import CompileCase

KIB = 1024
SHARED_LIMIT = {  # bytes one block may have
    "sm_75": 64 * KIB,
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
    "gfx1100": 64 * KIB,
    "gfx1201": 64 * KIB,
}
REGISTER_LIMIT = {"gfx942": 512, "gfx1100": 256, "gfx1201": 256}  # every NVIDIA target: 255


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one case on one target looks like; `error` alone is set where it did not compile.

    registers     per thread
    spills        instructions that move registers to and from local memory (AMD: registers spilled)
    shared        bytes of shared memory
    loop          instructions of the main loop, see machine_code.main_loop
    loop_kinds    {kind: count} of the main loop
    tensor        {tensor-core mnemonic: count} of the whole kernel
    loop_tensor   the same for the main loop
    calls         subroutines that stand in for instructions the GPU does not have
    in_flight     the main loop leaves a group of asynchronous tensor-core instructions running (sm_90)
    narrow, early, resident, per_element
                  as in layout.py; None on AMD, and per_element of what is no quantizer
    """

    error: str | None = None
    registers: int = 0
    spills: int = 0
    shared: int = 0
    loop: int = 0
    loop_kinds: dict[str, int] | None = None
    tensor: dict[str, int] | None = None
    loop_tensor: dict[str, int] | None = None
    calls: tuple[str, ...] = ()
    in_flight: bool = False
    narrow: int | None = None
    early: int | None = None
    resident: int | None = None
    per_element: float | None = None


def register_limit(target: str) -> int:
    return REGISTER_LIMIT.get(target, 255)


def compile_case(case: CompileCase, target: str) -> Compiled:
    """Compile one case for one target. Compiler errors come back in `error`, everything else raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    with _captured() as log:
        try:
            kernel = triton.compile(_source(case), target=gpu, options=options)
        except Exception as error:  # the compiler's own errors share no base class
            failure = error
        else:
            failure = None
    if failure is not None:
        return Compiled(error=_first_error(log.getvalue(), failure))
    if "cubin" in kernel.asm:
        return _measure_nvidia(kernel.asm["cubin"], kernel.metadata, case, target)
    return _measure_amd(kernel.asm["amdgcn"], kernel.metadata.shared, case.expect.get(target, ""))


def _source(case: CompileCase) -> object:
    from triton.compiler import ASTSource

    function = case.kernel
    while type(function).__name__ in ("Autotuner", "Heuristics"):
        function = function.fn
    names = list(function.arg_names)
    if missing := set(names) ^ {*case.signature, *case.constexprs}:
        raise ValueError(f"case {case.name!r}: {sorted(missing)} are not arguments of the kernel, or were left out")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    # without divisibility there are no vector loads: the launch finds it on the real pointers by itself
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in case.undivisible and (signature[name].startswith("*") or signature[name] in ("i32", "i64"))
    }
    if type(function).__name__ == "GluonJITFunction":
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(function, signature, dict(case.constexprs), divisible)
    return ASTSource(function, signature, dict(case.constexprs), divisible)


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    """Catch what the compiler writes to file descriptors 1 and 2, past Python."""
    log = io.StringIO()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield log
        finally:
            for stream, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, stream)
                os.close(descriptor)
            file.seek(0)
            log.write(file.read().decode(errors="replace"))


def _first_error(log: str, error: Exception) -> str:
    lines = [line.split("error:")[-1].strip() for line in log.splitlines() if "error:" in line]
    lines += [line for line in reversed(str(error).splitlines()) if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _measure_nvidia(cubin: bytes, metadata: Any, case: CompileCase, target: str) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, env=environment)
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    found = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    if found is None or not sass.stdout:
        raise RuntimeError(f"the disassembler failed: {sass.stderr or usage.stderr}")
    code, registers = machine_code.parse(sass.stdout), int(found[1])
    spills = sum(line.mnemonic.startswith(("STL", "LDL")) for line in code.instructions)
    loop = machine_code.main_loop(code, expected := case.expect.get(target, ""))
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    each = case.elements / (32 * case.num_warps)
    return replace(
        _measured(code, registers, spills, metadata.shared, expected),
        narrow=sum(map(layout.narrow_loads, machine_code.innermost_loops(code) if each else [loop])),
        early=layout.early_loads(loop),
        resident=layout.resident_blocks(target, registers, metadata.shared, case.num_warps, tensor_memory),
        per_element=layout.instructions_per_element(code, each) if each else None,
    )


def _measure_amd(assembly: str, shared: int, expected: str) -> Compiled:
    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    return _measured(
        machine_code.parse(assembly), metadata("vgpr_count"), metadata("vgpr_spill_count"), shared, expected
    )


def _measured(code: machine_code.Code, registers: int, spills: int, shared: int, expected: str) -> Compiled:
    loop = machine_code.main_loop(code, expected)
    return Compiled(
        registers=registers,
        spills=spills,
        shared=shared,
        loop=len(loop),
        loop_kinds=dict(machine_code.kinds(loop)),
        tensor=dict(machine_code.tensor_core(code.instructions)),
        loop_tensor=dict(machine_code.tensor_core(loop)),
        calls=tuple(machine_code.emulation_calls(code)),
        in_flight=machine_code.leaves_in_flight(loop),
    )
