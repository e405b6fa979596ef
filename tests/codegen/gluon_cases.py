"""The variants of every Gluon kernel: its tilings with the flags that change the code."""

from itertools import product

import torch

from svdquant_pack.kernels.backends.gluon import int4_mma, int8_async

from .cases import CompileCase

AMPERE = ("sm_80", "sm_86", "sm_89")
TURING = ("sm_75",)  # half precision is all it has
KINDS = {"signed": (0, 0), "unsigned": (0, 1024), "mixed": (512, 1024)}


def cases() -> list[CompileCase]:
    """All variants of all kernels, in the order of their names"""
    return [*int4_mma_cases(), *int8_async_cases()]


def int4_mma_cases() -> list[CompileCase]:
    """Kinds of groups and tilings, with bias"""
    ampere = product((int4_mma.LARGE, int4_mma.SMALL), KINDS)
    turing = [*product((int4_mma.LARGE_TURING,), KINDS), (int4_mma.SMALL_TURING, "signed")]
    return [_int4_mma_case(*variant) for variant in (*ampere, *turing)]


def _int4_mma_case(tiling: int4_mma.WarpTiling, kind: str) -> CompileCase:
    k, act_unsigned, turing = 1024, KINDS[kind], not tiling.stages
    scales = torch.float16 if turing else torch.bfloat16
    signature = dict.fromkeys(("codes", "act", "up"), "*i64")
    signature |= dict.fromkeys(("qact", "wscales", "bias", "out"), "*i32")
    signature |= dict.fromkeys(("M", "N", "K", "R", "as_step", "first_unsigned", "stop_unsigned"), "i32")
    targets = TURING if turing else AMPERE
    return CompileCase(
        name=f"gluon-int4-{kind}-{tiling.rows}x{tiling.columns}" + "-turing" * turing,
        kernel=int4_mma.int4_mma_kernel,
        signature={**signature, "ascales": "*fp16" if turing else "*bf16"},
        constexprs=int4_mma.compile_time(tiling, k, act_unsigned, scales, True),
        num_warps=tiling.warps,
        num_stages=1,
        targets=targets,
        expect=dict.fromkeys(targets, "IMMA.8832" if turing else "IMMA.16864"),
        undivisible=("M", "first_unsigned", "stop_unsigned"),
    )


def int8_async_cases() -> list[CompileCase]:
    """Both tilings with and without low-rank factors"""
    tilings = (("wide", int8_async.WIDE), ("square", int8_async.SQUARE))
    return [_int8_async_case(name, tiling, low_rank) for (name, tiling), low_rank in product(tilings, (False, True))]


def _int8_async_case(name: str, tiling: int8_async.RingTiling, low_rank: bool) -> CompileCase:
    elements = {"a_desc": "i8", "w_desc": "i8", "act_desc": "bf16", "up_desc": "bf16"}
    signature = {
        argument: f"tensordesc<{elements[argument]}{block},{layout!r}>"
        for argument, (block, layout) in int8_async.blocks(tiling, torch.bfloat16).items()
        if low_rank or argument in ("a_desc", "w_desc")
    }
    signature |= {"a_scale": "*fp32", "w_scale": "*fp32", "bias": "*bf16", "out": "*bf16"}
    signature |= dict.fromkeys(("M", "N", "K", "R"), "i32")
    absent = {} if low_rank else {"act_desc": None, "up_desc": None}
    return CompileCase(
        name=f"gluon-int8-async-{name}" + "-branch" * low_rank,
        kernel=int8_async.int8_async_kernel,
        signature=signature,
        constexprs=int8_async.compile_time(tiling, low_rank) | absent,
        num_warps=tiling.warps,
        num_stages=1,
        targets=("sm_90",),
        expect={"sm_90": "IGMMA"},
        async_marker=True,
        undivisible=("M",),
    )
