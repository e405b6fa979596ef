"""Host side of the kernels: outputs, tile sizes, one launch. Tensors are right already; nothing is checked here.

Every kernel has a class. Making an object of it looks up what does not change between calls; calling the object does
the rest. Objects keep no tensor: those of the layer come with each call, as they may lie elsewhere the next time.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from ...formats import E2M1_CODE, FORMATS, GROUP_SIZE, Tensors
from ...layer import RANK_TILE, Lora
from ...packing import by_column
from ...stages import CodedActivation, Coding, Range, channel_scales_of, weigh_
from .down import COLUMNS
from .gemm_nvfp4 import gemm_nvfp4
from .gemm_w4 import gemm_w4
from .gemm_w8 import gemm_w8
from .gemv_w4a16 import gemv_w4a16
from .quantize_groups import quantize_groups
from .quantize_nvfp4 import quantize_nvfp4
from .quantize_rows import quantize_rows
from .start import Launch
from .tiles import arch_of, converts_e2m1, has_asm, multiplies_16bit, settings

ACTIVATIONS = {"": 0, "gelu": 1, "silu": 2}
# Columns of the branch and of a LoRA together that are made while x is quantized; of more torch makes the LoRA's, by a
# second reading of x. For int4 codes on sm_89, 8 warps a block:
#   columns  registers  shared  blocks on an SM  instructions per number of x
#   32       48         16 KiB  5                26.2
#   64       58         24 KiB  3                27.6
#   128      64         40 KiB  2                29.9
#   256      124        72 KiB  1                34.2
# With 64 a layer of rank 32 runs the same kernel without a LoRA and with one of rank 32, for 5% more instructions
FUSED_COLUMNS = 64, 128
STEP = 64  # input channels that a program of a quantizing kernel reads at a time


class Epilogue(NamedTuple):
    """activation(product + act @ [proj_up | lora_up].T + bias)

    act         (M, R + R') contiguous as Quantizer and Columns make it, or None
    proj_up     (N, R), lora_up (N, R'), or None
    activation  a key of ACTIVATIONS
    """

    act: torch.Tensor | None = None
    proj_up: torch.Tensor | None = None
    lora_up: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    activation: str = ""

    def flags(self) -> dict[str, Any]:
        return {"ACTIVATION": ACTIVATIONS[self.activation]}


@cache
def no_strength(device: torch.device) -> torch.Tensor:
    """Strengths of a LoRA that has none; also where there is no LoRA, so that no other kernel is compiled for it"""
    return torch.ones(FUSED_COLUMNS[-1] // RANK_TILE, device=device)


def multiply_into(out: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> None:
    """out = x @ factor in the dtype of x, by torch"""
    torch.mm(x, factor if factor.dtype == x.dtype else factor.to(x.dtype), out=out)


def columns_by_torch(x: torch.Tensor, act: torch.Tensor, proj_down: torch.Tensor | None, lora: Lora | None) -> None:
    """Those columns of act = x @ [proj_down | lora.down * strength] whose factors are given; the LoRA's are the last"""
    if proj_down is not None:
        multiply_into(act[:, : proj_down.shape[1]], x, proj_down)
    if lora is not None:
        mine = act[:, act.shape[1] - lora.down.shape[1] :]
        multiply_into(mine, x, lora.down)
        weigh_(mine, lora.strength)


class Quantizer:
    """(qact, ascales, act) of activations like x (M, K), see stages.quantize_activation

    act    x @ [proj_down | lora.down * strength of RANK_TILE columns], rounded once; None without either
    downs  proj_down and lora_down like those of the calls, or None
    means  whether calls come with an act_mean. It and the rule of `coding` count for 4-bit codes alone

    ascales of NVFP4 are (ceil(K/64), M, 4): the four scales of 64 channels are one word
    """

    def __init__(
        self,
        x: torch.Tensor,
        downs: tuple[torch.Tensor | None, torch.Tensor | None],
        coding: Coding,
        smooth: bool = True,
        means: bool = False,
    ) -> None:
        (m, self.k), (codes, unsigned, rule) = x.shape, coding
        fmt, by_rows = FORMATS.get(codes), codes.endswith("_row")
        nvfp4 = fmt is not None and fmt.code == E2M1_CODE
        kernel = quantize_rows if by_rows else quantize_nvfp4 if nvfp4 else quantize_groups
        name = "quantize_rows" if by_rows else "quantize_nvfp4" if nvfp4 else "quantize_groups"
        options, arch = settings(name, x.device, m), arch_of(x.device)
        chunks = 0 if by_rows else options.pop("CHUNKS")
        in_pass = options.pop("FUSE") if by_rows else not chunks
        self._share(downs, in_pass or multiplies_16bit(arch))
        made = sum(self.ranks)
        flags = {
            "RANK": next(size for size in FUSED_COLUMNS if made <= size) if in_pass else 0,
            "COLUMNS": COLUMNS if not in_pass and multiplies_16bit(arch) else 0,
            "SMOOTH": smooth,
            "ASM": has_asm(arch),
            **options,
        }
        self.block, self.programs = options["BM"], 1
        blocks = 0 if in_pass else -(-made // COLUMNS)
        if by_rows:
            flags["FP8"] = codes == "fp8_row"
            self.behind: tuple[int, ...] = (*unsigned, blocks)
            self.codes = self.k
            self.scales: tuple[int, ...] = ()
            self.kinds = torch.float8_e4m3fn if codes == "fp8_row" else torch.int8, torch.float32
        else:
            steps = -(-self.k // STEP)
            self.programs = -(-steps // (chunks or steps)) if steps else 1
            eight = fmt is None
            flags["MEAN"] = means and not eight
            self.behind = (*(() if nvfp4 else unsigned), chunks or steps, blocks)
            if nvfp4:
                flags |= {"FOUR_SIX": rule == "four_six", "CONVERTS": converts_e2m1(arch)}
            else:
                flags |= {"EIGHT": eight, "SIGNED_EXTREME": rule == "signed_extreme" and not eight}
            self.codes = self.k if eight else self.k // 2
            self.scales = (steps,)
            self.kinds = torch.int8, torch.float8_e4m3fn if nvfp4 else torch.float32 if eight else x.dtype
        self.programs += blocks
        self.word = (4,) if nvfp4 else ()  # the scales of 64 channels
        self.by_rows, self.launch = by_rows, Launch(kernel, flags)

    def _share(self, downs: tuple[torch.Tensor | None, torch.Tensor | None], able: bool) -> None:
        """Who makes which columns: `ranks` are the kernel's, of the branch and of the LoRA"""
        proj_down, lora_down = downs
        rank, lora_rank = (0 if down is None else down.shape[1] for down in downs)
        self.width = rank + lora_rank
        # the kernel reads both as one matrix
        alike = proj_down is None or lora_down is None or proj_down.dtype == lora_down.dtype
        if not able or rank > FUSED_COLUMNS[-1]:
            self.ranks = 0, 0
        else:
            self.ranks = rank, lora_rank if alike and self.width <= FUSED_COLUMNS[-1] else 0
        self.left = rank > self.ranks[0], lora_rank > self.ranks[1]

    def __call__(
        self,
        x: torch.Tensor,
        smooth_factor: torch.Tensor | None,
        proj_down: torch.Tensor | None,
        act_mean: torch.Tensor | None = None,
        lora: Lora | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        m, stride = x.shape[0], x.stride()
        if stride[1] != 1:
            x = x.contiguous()
            stride = x.stride()
        codes, scales = self.kinds
        qact, ascales = x.new_empty(m, self.codes, dtype=codes), x.new_empty(*self.scales, m, *self.word, dtype=scales)
        act = x.new_empty(m, self.width) if self.width else None
        if m:
            rank, lora_rank = self.ranks
            strength = None if lora is None else lora.strength
            if strength is None:
                strength = no_strength(x.device)
            elif strength.dtype != torch.float32:
                strength = strength.float()
            # where there is nothing to read stands x, and for one of the factors the other, which is of its type
            lora_down = lora.down if lora_rank and lora is not None else None
            down = proj_down if rank and proj_down is not None else x if lora_down is None else lora_down
            tensors = (
                x,
                x if smooth_factor is None else smooth_factor,
                *(() if self.by_rows else (x if act_mean is None else act_mean,)),
                down,
                down if lora_down is None else lora_down,
                strength,
                qact,
                ascales,
                x if act is None else act,
            )
            numbers = (m, self.k, rank, lora_rank, self.width, stride[0], *self.behind)
            self.launch((-(-m // self.block), self.programs, 1), tensors, numbers)
            if act is not None and any(self.left):
                columns_by_torch(x, act, proj_down if self.left[0] else None, lora if self.left[1] else None)
        return qact, ascales, act


def quantize(
    x: torch.Tensor,
    smooth_factor: torch.Tensor | None,
    proj_down: torch.Tensor | None,
    coding: Coding,
    act_mean: torch.Tensor | None = None,
    lora: Lora | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantizer, for one call"""
    downs = proj_down, None if lora is None else lora.down
    quantizer = Quantizer(x, downs, coding, smooth_factor is not None, act_mean is not None)
    return quantizer(x, smooth_factor, proj_down, act_mean, lora)


class Product:
    """y = epilogue(codes of x @ weight.T), a matrix kernel for activations like x and epilogues like the one given

    numbers  N, K
    """

    def __init__(
        self, name: str, x: torch.Tensor, numbers: tuple[int, int], epilogue: Epilogue, flags: dict[str, Any]
    ) -> None:
        options = settings(name, x.device, x.shape[0])
        self.n, self.k = numbers
        self.block, self.columns = options["BM"], -(-self.n // options["BN"])
        self.width = self.k // 2 if name in BY_BYTE else self.k
        if "BK" in options:
            flags = {"EVEN": self.k % options["BK"] == 0, **flags}
        # pairs of codes are bytes without a sign
        words = (torch.uint8, torch.uint8) if name in BY_BYTE else ()
        self.dtype, self.launch = x.dtype, Launch(GEMMS[name], {**flags, **epilogue.flags(), **options}, words)

    def __call__(
        self,
        act: CodedActivation,
        weight: tuple[torch.Tensor, ...],
        epilogue: Epilogue,
        unsigned: tuple[int, ...] = (),
        requantized: tuple[torch.Tensor, ...] | None = (),
    ) -> torch.Tensor:
        """weight       codes and scales, as the kernel names them
        requantized  what it writes beside y; None for a kernel that could, and does not
        """
        qact, ascales = act
        low_rank, proj_up, lora_up, bias, _ = epilogue
        m = qact.shape[0]
        y = qact.new_empty(m, self.n, dtype=self.dtype)
        if m:
            tensors = (
                qact,
                weight[0],
                ascales,
                *weight[1:],
                y if low_rank is None else low_rank,  # y stands where there is nothing to read
                y if proj_up is None else proj_up,
                y if lora_up is None else lora_up,
                y if bias is None else bias,
                y,
                *((y, y, y) if requantized is None else requantized),
            )
            widths = (0 if proj_up is None else proj_up.shape[1], 0 if lora_up is None else lora_up.shape[1])
            biased = 0 if bias is None else self.n
            grid = (-(-m // self.block) * self.columns, 1, 1)
            self.launch(grid, tensors, (m, self.n, self.width, *widths, biased, *unsigned))
        return y


BY_BYTE = ("gemm_nvfp4",)  # these count a row in bytes of two codes
GEMMS = {"gemm_w4": gemm_w4, "gemm_w8": gemm_w8, "gemm_nvfp4": gemm_nvfp4}


def product_w4(
    x: torch.Tensor, numbers: tuple[int, int], eight: bool, epilogue: Epilogue, requantize: bool = False
) -> Product:
    """For a weight in 4 bit and codes of x in 4 bit, or in `eight`"""
    # MAGIC * scale is exact up to 22 significant bits: scales of int8 codes have 12 (round_up_12_bits),
    # fp16 has 11 and bf16 8; those of fp32 activations have 24 and take the longer way
    fold = eight or x.element_size() == 2
    arch = arch_of(x.device)
    flags = {"EIGHT": eight, "FOLD": fold, "REQUANTIZE": requantize, "ASM": has_asm(arch)}
    # compiled for AMD, and beside codes of 4 bit, words take more instructions and wait no less
    flags["PAIRS"] = eight and numbers[0] % 2 == 0 and not arch.startswith("gfx")
    return Product("gemm_w4", x, numbers, epilogue, flags)


def multiply_w4(
    act: CodedActivation,
    weight: Tensors,
    epilogue: Epilogue,
    unsigned: Range,
    dtype: torch.dtype,
    next_smooth: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """(y,) = epilogue(decode(act) @ decode(weight).T), weight in 4 bit, act in 4 or 8; for one call

    weight       qweight and wscales of a layer
    unsigned     channels whose 4-bit codes are 0..15
    next_smooth  (N,) smooth_factor of a next layer: then (y, qact, ascales), its unsigned codes of y + GELU_SHIFT
    """
    qact, qweight = act.qact, weight["qweight"]
    (m, width), (n, half) = qact.shape, qweight.shape
    like, requantized = qact.new_empty(m, 0, dtype=dtype), None
    if next_smooth is not None:
        requantized = qact.new_empty(m, n // 2), qact.new_empty(n // GROUP_SIZE, m, dtype=dtype)
    product = product_w4(like, (n, 2 * half), width == 2 * half, epilogue, next_smooth is not None)
    beside = None if next_smooth is None or requantized is None else (next_smooth, *requantized)
    y = product(act, (qweight, weight["wscales"]), epilogue, unsigned, beside)
    return y, *(requantized or ())


def multiply_w8(
    act: CodedActivation, weight: torch.Tensor, row_scales: torch.Tensor, epilogue: Epilogue, dtype: torch.dtype
) -> torch.Tensor:
    """y = epilogue((qact @ weight.T) * ascales[:, None] * row_scales), int8 rows (N, K) with scales (N,) float32"""
    like = act.qact.new_empty(act.qact.shape[0], 0, dtype=dtype)
    product = Product("gemm_w8", like, (weight.shape[0], weight.shape[1]), epilogue, {})
    return product(act, (weight, row_scales), epilogue)


def multiply_nvfp4(act: CodedActivation, weight: Tensors, epilogue: Epilogue, dtype: torch.dtype) -> torch.Tensor:
    """y = epilogue(decode(act) @ decode(weight).T), NVFP4 codes on both sides; for one call

    act     as `quantize` leaves it
    weight  qweight and wscales of a layer, and wtscale and wcscales if it has them
    """
    n, half = weight["qweight"].shape
    like = act.qact.new_empty(act.qact.shape[0], 0, dtype=dtype)
    product = Product("gemm_nvfp4", like, (n, 2 * half), epilogue, {})
    return product(act, nvfp4_weight(weight, channel_scales_of(weight)), epilogue)


def nvfp4_weight(weight: Tensors, channel_scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As gemm_nvfp4 reads them: with four scales of a column side by side, which needs a copy if it was never packed"""
    qweight, wscales = weight["qweight"], weight["wscales"]
    if wscales.stride() != (1, -(-qweight.shape[1] // 32) * 4):
        wscales = by_column(wscales, 4)
    return qweight, wscales, channel_scales


class Gemv:
    """y = x @ decode(weight).T + bias for activations like x: 4-bit weights with zeros, 16-bit activations"""

    def __init__(self, x: torch.Tensor, n: int, bias: bool) -> None:
        options = settings("gemv_w4a16", x.device, x.shape[0])
        self.n, self.rows, self.programs = n, options["BM"], -(-n // options["BN"])
        self.launch = Launch(gemv_w4a16, {"BIAS": bias, **options})

    def __call__(self, x: torch.Tensor, weight: Tensors, bias: torch.Tensor | None) -> torch.Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        m, k = x.shape
        y = x.new_empty(m, self.n)
        if m:
            tensors = (x, weight["qweight"], weight["wscales"], weight["wzeros"], y if bias is None else bias, y)
            self.launch((self.programs, -(-m // self.rows), 1), tensors, (m, self.n, k, x.stride(0)))
        return y


def multiply_gemv(
    x: torch.Tensor, qweight: torch.Tensor, wscales: torch.Tensor, wzeros: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Gemv, for one call"""
    weight = {"qweight": qweight, "wscales": wscales, "wzeros": wzeros}
    return Gemv(x, qweight.shape[0], bias is not None)(x, weight, bias)
