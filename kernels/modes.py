"""The ways to compute a 4-bit layer. Which of them `auto` tries on which GPU is a table in each format's own file.

              weight in memory   computes with
    w4a4      4 bit              4-bit codes on both sides: the layer as it was made
    w4a8      4 bit              activations in 8 bit, one scale per group of channels
    w4a8-jit  4 bit              the weight is expanded to int8 rows for the call, activations int8 per row
    w8a8      8 bit more         the same numbers as w4a8-jit, the int8 rows are kept
    fp8       4 bit              the weight is expanded to e4m3 rows for the call, activations e4m3 per row
    w16       4 bit              the weight is expanded to 16 bit for the call, activations are not quantized
    w4a16     4 bit              w16 inside one kernel, for layers with 16-bit activations and few rows

A layer that was made for 8-bit activations (LayerSpec.act_bits) takes the best of the other modes than w4a4.
Every 8-bit mode is closer to the 16-bit model than w4a4: what they round is the smaller part of the error.
"""

from dataclasses import dataclass

AUTO, MEASURED = "auto", "measured"  # by the tables alone; by what was timed on this machine, else by the tables
COMPUTES = (AUTO, "w4a4", "w4a8", "w8a8", "w4a8-jit", "fp8", "w16", MEASURED)
KEPT = ("w8a8",)  # takes memory beside the layer: runs only where a table or the user says so
FEW = 128  # rows up to which reading the weight, not the tensor cores, takes the time
SOME = 768  # rows up to which expanding the weight for the call costs more than it gains, without wgmma
USUAL_ROWS = 4096  # a 1024 x 1024 image of a transformer


@dataclass(frozen=True)
class Mode:
    """`compute` is worth trying for calls of at most `rows` rows on devices whose arch starts with `arch`."""

    arch: str
    compute: str
    rows: int | None = None


W16 = Mode("", "w16")  # runs everywhere: the last mode of every format
