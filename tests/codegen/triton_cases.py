"""The variants of every Triton kernel: each entry of tiles.json with the flags that change the code."""

from itertools import product
from typing import Any

from svdquant_pack.kernels.backends.triton.down import COLUMNS
from svdquant_pack.kernels.backends.triton.expand_weight import expand_weight
from svdquant_pack.kernels.backends.triton.gemm_nvfp4 import gemm_nvfp4
from svdquant_pack.kernels.backends.triton.gemm_w4 import gemm_w4
from svdquant_pack.kernels.backends.triton.gemm_w8 import gemm_w8
from svdquant_pack.kernels.backends.triton.gemv_w4a16 import gemv_w4a16
from svdquant_pack.kernels.backends.triton.launch import FUSED_COLUMNS, STEP
from svdquant_pack.kernels.backends.triton.quantize_groups import quantize_groups
from svdquant_pack.kernels.backends.triton.quantize_nvfp4 import quantize_nvfp4
from svdquant_pack.kernels.backends.triton.quantize_rows import quantize_rows
from svdquant_pack.kernels.backends.triton.tiles import as_shipped, entry, has_asm, multiplies_16bit

from .cases import FLOAT, INT8, INT8_TARGETS, NVFP4_TARGETS, TARGETS, CompileCase

ROWS = tuple(4**power for power in range(2, 11))  # every bucket by which settings are looked up
AMD_A4 = "nibbles are unpacked one by one without PTX; w4a8 is what runs there unless w4a4 is asked for"


def cases() -> list[CompileCase]:
    """All variants of all kernels, in the order of their names"""
    return [
        *expand_weight_cases(),
        *gemm_nvfp4_cases(),
        *gemm_w4_cases(),
        *gemm_w8_cases(),
        *gemv_w4a16_cases(),
        *quantize_groups_cases(),
        *quantize_nvfp4_cases(),
        *quantize_rows_cases(),
    ]


def shipped(kernel: str, targets: tuple[str, ...]) -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """(name, settings, the targets that use them) of every entry that any of `targets` reaches"""
    users: dict[int, list[str]] = {}
    for target in targets:
        for index in sorted({entry(kernel, target, rows) for rows in ROWS}):
            users.setdefault(index, []).append(target)
    return [(f"{kernel}-{index}", dict(as_shipped(kernel, index)), tuple(found)) for index, found in users.items()]


def columns_of(in_pass: bool, targets: tuple[str, ...]) -> list[tuple[str, dict[str, int], tuple[str, ...]]]:
    """[(ending of the name, RANK and COLUMNS, its targets)]: how a quantizer makes columns of x @ down, see down.py"""
    if in_pass:
        widths = (("" if size == FUSED_COLUMNS[0] else f"-columns{size}", size) for size in FUSED_COLUMNS)
        return [(ending, {"RANK": size, "COLUMNS": 0}, targets) for ending, size in widths]
    parts = [(columns, tuple(t for t in targets if multiplies_16bit(t) is bool(columns))) for columns in (COLUMNS, 0)]
    return [("", {"RANK": 0, "COLUMNS": columns}, able) for columns, able in parts if able]


def split_by_asm(targets: tuple[str, ...]) -> list[tuple[bool, tuple[str, ...]]]:
    """[(ASM, its targets)]: a kernel is another one where it may not hold PTX"""
    parts = [(asm, tuple(target for target in targets if has_asm(target) is asm)) for asm in (True, False)]
    return [part for part in parts if part[1]]


def launch_options(options: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    """(constexprs, num_warps, num_stages) of one entry's settings"""
    constexprs = dict(options)
    return constexprs, constexprs.pop("num_warps"), constexprs.pop("num_stages")


EXPANDED = {  # what is read and written: signature, flags
    "int4-int8": ({"wscales": "*bf16", "weight": "*i8"}, {"NVFP4": False, "UNIT": 15, "SMOOTH": False}),
    "nvfp4-int8": ({"wscales": "*u8", "weight": "*i8"}, {"NVFP4": True, "UNIT": 20, "SMOOTH": False}),
    "int4-fp16": ({"wscales": "*fp16", "weight": "*fp16"}, {"NVFP4": False, "UNIT": 0, "SMOOTH": True}),
    "nvfp4-bf16": ({"wscales": "*u8", "weight": "*bf16"}, {"NVFP4": True, "UNIT": 0, "SMOOTH": True}),
}


def expand_weight_cases() -> list[CompileCase]:
    """int8 and 16-bit weights of both formats in every shipped setting; no tensor cores, so Turing too"""
    signature = {"qweight": "*i8", "wzeros": "*bf16", "smooth_factor": "*bf16"}
    signature |= dict.fromkeys(("channel_scales", "row_scales", "shift"), "*fp32")
    signature |= dict.fromkeys(("N", "K", "stride_g", "stride_n", "unsigned_start", "unsigned_stop"), "i32")
    cases = []
    for name, options, targets in shipped("expand_weight", TARGETS):
        constexprs, warps, stages = launch_options(options)
        size = constexprs.pop("BYTES")
        for flavour, (types, flags) in EXPANDED.items():
            more = {"GROUPS": size // (8 if flags["NVFP4"] else 32), "CHANNEL": flags["NVFP4"]}
            more |= {"AWQ": False, "SHIFT": False, "stride_g" if flags["NVFP4"] else "stride_n": 1}
            # bf16 does not exist on Turing
            able = tuple(target for target in targets if target != "sm_75" or flavour != "nvfp4-bf16")
            cases.append(
                CompileCase(
                    f"{name}-{flavour}",
                    expand_weight,
                    {name: kind for name, kind in (signature | types).items() if name not in more},
                    constexprs | flags | more,
                    warps,
                    stages,
                    able,
                )
            )
    return cases


def gemm_nvfp4_cases() -> list[CompileCase]:
    """With and without GELU in every shipped setting"""
    signature = dict.fromkeys(("act", "proj_up", "lora_up", "bias", "out"), "*bf16")
    signature |= {"qact": "*u8", "qweight": "*u8", "ascales": "*fp8e4nv", "wscales": "*fp8e4nv"}
    signature |= {"channel_scales": "*fp32"}
    signature |= dict.fromkeys(("M", "N", "half", "R", "R_LORA", "biased"), "i32")
    cases = []
    for name, options, targets in shipped("gemm_nvfp4", NVFP4_TARGETS):
        constexprs, warps, stages = launch_options(options)
        constexprs |= {"EVEN": True}
        for activation in (0, 1):
            cases.append(
                CompileCase(
                    name + "-gelu" * activation,
                    gemm_nvfp4,
                    signature,
                    constexprs | {"ACTIVATION": activation},
                    warps,
                    stages,
                    targets,
                    {"sm_100": "UTCOMMA", "sm_120": "OMMA"},
                    undivisible=("M", "biased"),
                )
            )
    return cases


ACTIVATIONS = {  # what changes the kernel, beside the tile
    "a8": {"EIGHT": True, "ACTIVATION": 0, "REQUANTIZE": False},
    "a4": {"EIGHT": False, "ACTIVATION": 0, "REQUANTIZE": False},
    "a8-requantize": {"EIGHT": True, "ACTIVATION": 1, "REQUANTIZE": True},
}


def gemm_w4_cases() -> list[CompileCase]:
    """8- and 4-bit activations, and the requantizing epilogue, in every shipped setting"""
    signature = dict.fromkeys(("act", "proj_up", "lora_up", "bias", "out", "wscales"), "*bf16")
    signature |= {"qact": "*i8", "qweight": "*i8"}
    signature |= {"next_smooth": "*bf16", "next_qact": "*i8", "next_ascales": "*bf16"}
    signature |= dict.fromkeys(("M", "N", "K", "R", "R_LORA", "biased", "unsigned_start", "unsigned_stop"), "i32")
    cases = []
    for name, options, reached in shipped("gemm_w4", INT8_TARGETS):
        constexprs, warps, stages = launch_options(options)
        constexprs |= {"FOLD": True}
        for flavour, flags in ACTIVATIONS.items():
            for asm, targets in split_by_asm(reached):
                # a tile of 16 rows is too small for Hopper's instruction of 64
                cores = INT8 | ({"sm_90": "IMMA"} if constexprs["BM"] < 64 else {})
                cases.append(
                    CompileCase(
                        f"{name}-{flavour}" + "-amd" * (not asm),
                        gemm_w4,
                        signature | {"ascales": "*fp32" if flags["EIGHT"] else "*bf16"},
                        constexprs | flags | {"ASM": asm, "PAIRS": asm and flags["EIGHT"]},
                        warps,
                        stages,
                        targets,
                        {target: cores[target] for target in targets},
                        {} if asm or flavour != "a4" else dict.fromkeys(targets, AMD_A4),
                        undivisible=("M", "biased"),
                    )
                )
    return cases


def gemm_w8_cases() -> list[CompileCase]:
    """With and without GELU in every shipped setting"""
    signature = dict.fromkeys(("act", "proj_up", "lora_up", "bias", "out"), "*bf16")
    signature |= {"qact": "*i8", "weight": "*i8"}
    signature |= dict.fromkeys(("ascales", "row_scales"), "*fp32")
    signature |= dict.fromkeys(("M", "N", "K", "R", "R_LORA", "biased"), "i32")
    cases = []
    for name, options, targets in shipped("gemm_w8", INT8_TARGETS):
        constexprs, warps, stages = launch_options(options)
        constexprs |= {"EVEN": True}
        for activation in (0, 1):
            cases.append(
                CompileCase(
                    name + "-gelu" * activation,
                    gemm_w8,
                    signature,
                    constexprs | {"ACTIVATION": activation},
                    warps,
                    stages,
                    targets,
                    {target: INT8[target] for target in targets},
                    undivisible=("M", "biased"),
                )
            )
    return cases


def gemv_w4a16_cases() -> list[CompileCase]:
    """Every shipped setting"""
    signature = dict.fromkeys(("x", "wscales", "wzeros", "bias", "out"), "*bf16") | {"qweight": "*i8"}
    signature |= dict.fromkeys(("M", "N", "K", "stride_x"), "i32")
    cases = []
    for name, options, targets in shipped("gemv_w4a16", INT8_TARGETS):
        constexprs, warps, stages = launch_options(options)
        cases.append(
            CompileCase(
                name,
                gemv_w4a16,
                signature,
                constexprs | {"BIAS": True},
                warps,
                stages,
                targets,
                {target: FLOAT[target] for target in targets},
                undivisible=("M",),
            )
        )
    return cases


QUANTIZER = dict.fromkeys(("x", "smooth_factor", "proj_down", "lora_down", "act"), "*bf16")
QUANTIZER |= {"strength": "*fp32", "qact": "*i8"}
QUANTIZER |= dict.fromkeys(("M", "K", "R", "R_LORA", "width", "stride_x", "blocks"), "i32")
UNEVEN = ("M", "blocks", "groups", "steps", "unsigned_start", "unsigned_stop")


def quantize_groups_cases() -> list[CompileCase]:
    """int4 and int8 codes in every shipped setting, with a usual number of columns and with the most

    Where INT4 tensor cores are, int4 also with both kinds of groups and the longer rule; Turing has no other, in fp16.
    """
    signature = QUANTIZER | {"act_mean": "*bf16"} | dict.fromkeys(("unsigned_start", "unsigned_stop", "groups"), "i32")
    cases = []
    for name, options, reached in shipped("quantize_groups", TARGETS):
        chunks = options.pop("CHUNKS")
        cases += _int4_route_cases(name, signature, options, not chunks, reached)
        constexprs, warps, stages = launch_options(options)
        constexprs |= {"SMOOTH": True, "SIGNED_EXTREME": False}
        able = tuple(target for target in reached if target in INT8_TARGETS)
        for eight, (ending, flags, some) in product((False, True), columns_of(not chunks, able)):
            for asm, targets in split_by_asm(some):
                cases.append(
                    CompileCase(
                        f"{name}-{'int8' if eight else 'int4'}{ending}" + "-amd" * (not asm),
                        quantize_groups,
                        signature | {"ascales": "*fp32" if eight else "*bf16"},
                        constexprs | flags | {"EIGHT": eight, "MEAN": not eight, "ASM": asm},
                        warps,
                        stages,
                        targets,
                        {target: FLOAT[target] for target in targets},
                        undivisible=UNEVEN,
                        elements=STEP * constexprs["BM"],
                    )
                )
    return cases


def _int4_route_cases(
    name: str, signature: dict[str, str], options: dict[str, Any], in_pass: bool, reached: tuple[str, ...]
) -> list[CompileCase]:
    """What is in front of the INT4 tensor cores, with everything that a layer may ask of it"""
    constexprs, warps, stages = launch_options(options)
    constexprs |= dict.fromkeys(("SMOOTH", "MEAN", "SIGNED_EXTREME", "ASM"), True) | {"EIGHT": False}
    turing = dict.fromkeys(("x", "proj_down", "lora_down", "act", "ascales"), "*fp16")
    cases = []
    for ending, flags, some in columns_of(in_pass, reached)[:2]:
        if flags["RANK"] == FUSED_COLUMNS[-1]:
            continue
        for flavour, types, able in (
            ("", {"ascales": "*bf16"}, ("sm_80", "sm_86", "sm_89")),
            ("-turing", turing, ("sm_75",)),
        ):
            if targets := tuple(target for target in some if target in able):
                expected = {target: FLOAT[target] for target in targets if target in FLOAT}
                cases.append(
                    CompileCase(
                        f"{name}-int4-every-rule{ending}{flavour}",
                        quantize_groups,
                        signature | types,
                        constexprs | flags,
                        warps,
                        stages,
                        targets,
                        expected,
                        undivisible=UNEVEN,
                    )
                )
    return cases


def quantize_nvfp4_cases() -> list[CompileCase]:
    """Both rules in every shipped setting, with a usual number of columns and with the most"""
    signature = QUANTIZER | {"act_mean": "*bf16", "ascales": "*fp8e4nv", "steps": "i32"}
    cases = []
    for name, options, reached in shipped("quantize_nvfp4", NVFP4_TARGETS):
        chunks = options.pop("CHUNKS")
        constexprs, warps, stages = launch_options(options)
        constexprs |= {"SMOOTH": True, "MEAN": True, "ASM": True, "CONVERTS": True}
        for four_six, (ending, flags, targets) in product((False, True), columns_of(not chunks, reached)):
            cases.append(
                CompileCase(
                    name + "-four-six" * four_six + ending,
                    quantize_nvfp4,
                    signature,
                    constexprs | flags | {"FOUR_SIX": four_six},
                    warps,
                    stages,
                    targets,
                    {target: FLOAT[target] for target in targets},
                    undivisible=UNEVEN,
                    elements=STEP * constexprs["BM"],
                )
            )
    return cases


def quantize_rows_cases() -> list[CompileCase]:
    """int8 and fp8 codes in every shipped setting, with a usual number of columns and with the most"""
    signature = QUANTIZER | {"ascales": "*fp32"} | dict.fromkeys(("unsigned_start", "unsigned_stop"), "i32")
    cases = []
    for name, options, reached in shipped("quantize_rows", INT8_TARGETS):
        fuse = options.pop("FUSE")
        constexprs, warps, stages = launch_options(options)
        constexprs |= {"SMOOTH": True}
        kinds = (False, reached), (True, tuple(t for t in reached if t in ("sm_89", "sm_90", "sm_100")))
        for fp8, able in kinds:
            for ending, flags, some in columns_of(fuse, able):
                for asm, targets in split_by_asm(some):
                    cases.append(
                        CompileCase(
                            f"{name}-{'fp8' if fp8 else 'int8'}{ending}" + "-amd" * (not asm),
                            quantize_rows,
                            signature | {"qact": "*fp8e4nv" if fp8 else "*i8"},
                            constexprs | flags | {"FP8": fp8, "ASM": asm},
                            warps,
                            stages,
                            targets,
                            {target: FLOAT[target] for target in targets},
                            undivisible=UNEVEN,
                            elements=constexprs["BM"] * constexprs["BK"],
                        )
                    )
    return cases
