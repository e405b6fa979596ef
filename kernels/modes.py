"""Compute modes, and which of them `auto` tries on which GPU: one table.

    mode      weight in memory   computes with
    w4a4      4 bit              4-bit codes on both sides: the layer as it was made
    w4a8      4 bit              activations in 8 bit, one scale per 64 channels
    w4a8-jit  4 bit              the weight is expanded to int8 rows for the call, activations int8 per row
    w8a8      8 bit more         the same numbers as w4a8-jit, the int8 rows are kept
    fp8       4 bit              the weight is expanded to e4m3 rows for the call, activations e4m3 per row
    w16       4 bit              the weight is expanded to 16 bit for the call, activations are not quantized
    w4a16     4 bit              w16 inside one kernel, for awq layers with few rows

A layer that was made for 8-bit activations (LayerSpec.act_bits) takes the best of the other modes than w4a4.
Every 8-bit mode is closer to the 16-bit model than w4a4: what they round is the smaller part of the error.
"""

from dataclasses import dataclass

COMPUTES = ("auto", "w4a4", "w4a8", "w8a8", "w4a8-jit", "fp8", "w16")
FEW = 128  # rows up to which reading the weight, not the tensor cores, takes the time
SOME = 768  # rows up to which expanding the weight for the call costs more than it gains, without wgmma


@dataclass(frozen=True)
class Rule:
    """`backends` may run `compute` for calls of at most `rows` rows on GPUs whose arch starts with `arch`."""

    arch: str
    compute: str
    backends: tuple[str, ...]
    rows: int | None = None


W16 = Rule("", "w16", ("triton", "reference"))
CPU = ("triton", "reference")  # Triton runs there in its interpreter alone

INT4 = (
    Rule("cpu", "w4a4", CPU),
    Rule("cpu", "w4a8", CPU),
    Rule("sm_75", "w4a4", ("gluon",)),
    # an A100's int8 path is limited by the rescaling of groups, which expanded rows do not need
    Rule("sm_80", "w4a8", ("triton",), SOME),
    Rule("sm_80", "w4a8-jit", ("triton",)),
    Rule("sm_8", "w4a4", ("kitchen", "gluon")),
    Rule("sm_8", "w4a8", ("triton",)),
    Rule("sm_90", "w4a8", ("triton",), FEW),
    Rule("sm_90", "w4a8-jit", ("gluon", "triton")),
    Rule("sm_90", "fp8", ("triton",)),
    # int4 is emulated from sm_90 on, and int8 on sm_100 runs at a fraction of fp8
    Rule("sm_10", "w4a8", ("triton",), FEW),
    Rule("sm_10", "fp8", ("triton",)),
    Rule("sm_10", "w4a8-jit", ("triton",)),
    Rule("sm_12", "w4a8", ("triton",)),
    Rule("sm_12", "w4a8-jit", ("triton",)),
    Rule("gfx", "w4a8", ("triton",)),
    Rule("gfx", "w4a8-jit", ("triton",)),
    W16,
)
NVFP4 = (
    Rule("cpu", "w4a4", CPU),
    Rule("cpu", "w4a8-jit", CPU),
    Rule("sm_10", "w4a4", ("triton",)),
    Rule("sm_12", "w4a4", ("triton",)),
    Rule("sm_10", "fp8", ("triton",)),
    Rule("sm_8", "w4a8-jit", ("triton",)),
    Rule("sm_90", "w4a8-jit", ("gluon", "triton")),
    Rule("sm_12", "w4a8-jit", ("triton",)),
    Rule("gfx", "w4a8-jit", ("triton",)),
    W16,
)
AWQ = (Rule("", "w4a16", ("triton", "reference"), FEW), W16)
TABLE = {"int4": INT4, "nvfp4": NVFP4, "awq_w4a16": AWQ}


def candidates(format: str, arch: str, compute: str, rows: int, act_bits: int = 4) -> tuple[Rule, ...]:
    """What to try, best first; `arch` is "cpu" on a CPU. A mode the user asks for may run on any backend.

    Layers that keep 16-bit activations have no other mode than their own, whatever is asked for.
    """
    if compute != "auto" and format != "awq_w4a16":
        return (Rule(arch, compute, ()),)
    rules = TABLE.get(format, (W16,))
    found = (rule for rule in rules if arch.startswith(rule.arch) and (rule.rows is None or rows <= rule.rows))
    return tuple(rule for rule in found if act_bits == 4 or rule.compute != "w4a4")


def faster_format(format: str, arch: str) -> str | None:
    """The format whose files such a GPU computes in w4a4, where it has only another mode for those of `format`

    None where `format` is as good as it gets there, and for layers that have no w4a4.
    """
    four_bit = [name for name in TABLE if candidates(name, arch, "auto", SOME + 1)[0].compute == "w4a4"]
    has_w4a4 = any(rule.compute == "w4a4" for rule in TABLE.get(format, ()))
    return next(iter(four_bit), None) if has_w4a4 and format not in four_bit else None
