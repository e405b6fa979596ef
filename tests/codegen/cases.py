"""A compile case is one shipped variant of one kernel and what its machine code has to look like on each GPU.

Which there are is said in triton_cases.py and gluon_cases.py, one function per kernel. This file imports no kernel
library: `kernel` is whatever object that library compiles.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NVIDIA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942", "gfx1100", "gfx1201")
TARGETS = NVIDIA + AMD
INT8_TARGETS = tuple(target for target in TARGETS if target != "sm_75")  # Triton has no int8 product for Turing
NVFP4_TARGETS = ("sm_100", "sm_120")
# what the tensor cores of a target are called in its machine code
INT8 = {
    "sm_80": "IMMA",
    "sm_86": "IMMA",
    "sm_89": "IMMA",
    "sm_90": "IGMMA",
    "sm_100": "IMMA",
    "sm_120": "IMMA",
    "gfx942": "v_mfma_i32",
    "gfx1100": "v_wmma_i32",
    "gfx1201": "v_wmma_i32",
}
FLOAT = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HMMA",
    "sm_100": "HMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma_f32",
    "gfx1100": "v_wmma_f32",
    "gfx1201": "v_wmma_f32",
}


@dataclass(frozen=True)
class CompileCase:
    """One shipped variant of one kernel and what its machine code has to look like.

    name          unique; names the row of the code table and the stored budget
    kernel        the jit function (an autotuner or heuristics object is unwrapped)
    signature     {argument: type}: "*bf16", "*i8", "i32", "fp32", "tensordesc<i8[128, 128]>"; pointers and integers
                  count as divisible by 16 unless named in `undivisible`
    constexprs    {argument: value}; every argument is in exactly one of the two
    num_warps, num_stages  as given to the launch
    targets       the GPUs it is shipped for
    expect        {target: part of the mnemonic of its tensor-core instruction}; a target left out expects none
    allow_spills  {target: why spilling is accepted there}
    async_marker  on sm_90 the main loop must leave one group of tensor-core instructions in flight
    undivisible   arguments that may be any number: odd M, for one
    options       further compile options, {"maxnreg": 128} for one
    elements      of a quantizer: how many numbers a block quantizes in one pass of its loop
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    targets: tuple[str, ...]
    expect: Mapping[str, str] = field(default_factory=dict)
    allow_spills: Mapping[str, str] = field(default_factory=dict)
    async_marker: bool = False
    undivisible: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    elements: int = 0

    def __post_init__(self) -> None:
        if unknown := {*self.targets, *self.expect, *self.allow_spills} - set(TARGETS):
            raise ValueError(f"case {self.name!r} names targets {sorted(unknown)}, known are {', '.join(TARGETS)}")
        if twice := set(self.signature) & set(self.constexprs):
            raise ValueError(f"case {self.name!r} has {sorted(twice)} both in signature and in constexprs")
