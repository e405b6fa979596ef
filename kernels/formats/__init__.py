"""Number formats of a 4-bit linear layer. FORMATS is what lies in this folder; a new one is a file with `FORMAT`.

A format owns everything about itself: which 16 values a code can mean, how many inputs share a scale, how a weight is
encoded and decoded, the grid that a quantizer searches, what happens to the activation, how files spell it, the 8-bit
codes it expands to, and which way of computing is tried first on which GPU. Nothing outside this folder asks for a
format by name: it asks for what the format says of itself.
"""

import sys
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import ClassVar

import torch

from ..discover import modules
from ..modes import W16, Mode
from ..packing import unpack

__all__ = [
    "DEFAULT",
    "FORMATS",
    "GELU_SHIFT",
    "GROUP_SIZE",
    "MODULATION",
    "SIXTEEN_BIT",
    "Format",
    "TensorSpec",
    "Tensors",
    "by_group",
    "format_named",
]

Tensors = Mapping[str, torch.Tensor]
SIXTEEN_BIT = (torch.bfloat16, torch.float16, torch.float32)  # fp32 is legal wherever a 16-bit float is expected
GELU_SHIFT = 0.171875  # 11/64: just above -min(GELU) = 0.1700, so that shifted activations fit unsigned codes
GROUP_SIZE = 64  # input channels that share a scale in int4, in awq_w4a16, and in 8-bit codes of activations
EXPANDED_ROWS = 128  # of a weight that are expanded at a time on a CPU: what is in between stays in its cache
DEFAULT, MODULATION = "int4", "awq_w4a16"  # of layers with 4-bit activations, and of those with 16-bit ones
# what the four bits of a code mean to a kernel
TWOS_COMPLEMENT, E2M1_CODE, OFFSET_8 = "two's complement", "e2m1", "offset 8"
STOCK_RULE = "absmax"  # the rule for activation scales that every engine has


@dataclass(frozen=True)
class TensorSpec:
    """What a format asks of one stored tensor: its shape, the dtypes it may have, and whether it may be absent."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


class Format:
    """One kind of 4-bit layer. A subclass states the table below and overrides the methods of its grid.

    name          as written in widgets and records
    group_size    input channels that share one weight scale
    code          what four bits mean to a kernel: TWOS_COMPLEMENT, E2M1_CODE, OFFSET_8, or a word of its own, which no
                  kernel but the reference claims
    low_rank      whether the layer carries smooth_factor, proj_down and proj_up, may carry means, and rounds its
                  activation; else activations stay in 16 bit
    unsigned_act  whether a range of input channels may use unsigned codes, shifted by GELU_SHIFT
    act_rules     how the scale of an activation may be chosen, the stock rule first, the best one last
    act_range     (least, largest) extreme of a group of smoothed activations at which its scale has all its bits;
                  None where scales have the range of the activation
    act8_group    input channels that share a scale of 8-bit activation codes in w4a8; None where there is no w4a8
    units         {dtype of 8-bit rows: code of a 1 in the row's largest group}: with these every code of that group is
                  an integer (int8) or exact (fp8). Empty where a weight is not expanded
    by_column     {tensor of shape (G, N): multiple} of tensors that a packed layer holds column by column, each a
                  multiple of so many numbers long: kernels then read as many of them at once
    computes      the compute modes that are defined for it, see kernels/modes.py
    modes         what `auto` tries, best first
    spellings     {dialect of files: names there, the one that is written first}. A dialect that is not named cannot
                  hold the format; the native one holds every format, as svdquant_<name> unless said otherwise.
                  "published" is the word in the names of files on the hub
    """

    name: ClassVar[str]
    group_size: ClassVar[int]
    code: ClassVar[str]
    low_rank: ClassVar[bool] = True
    unsigned_act: ClassVar[bool] = False
    act_rules: ClassVar[tuple[str, ...]] = (STOCK_RULE,)
    act_range: ClassVar[tuple[float, float] | None] = None
    act8_group: ClassVar[int | None] = None
    units: ClassVar[Mapping[torch.dtype, int]] = MappingProxyType({})
    by_column: ClassVar[Mapping[str, int]] = MappingProxyType({})
    computes: ClassVar[tuple[str, ...]] = ("w4a4", "w16")
    modes: ClassVar[tuple[Mode, ...]] = (Mode("cpu", "w4a4"), W16)
    spellings: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})

    def __init__(self) -> None:
        # every name that `parts` can give, in its order: the order in which the operator takes the tensors
        self.part_names = tuple(self.parts(self.group_size, 2 * self.group_size, 1 if self.low_rank else 0))

    # -- storage

    def weight_parts(self, n: int, k: int) -> dict[str, TensorSpec]:
        """The tensors of the encoded (n, k) weight alone."""
        raise NotImplementedError

    @cache  # noqa: B019 (formats live as long as the process)
    def parts(self, n: int, k: int, rank: int) -> Mapping[str, TensorSpec]:
        """Every tensor of an (n, k) layer of this format, low-rank branch included."""
        parts = dict(self.weight_parts(n, k))
        if self.low_rank:
            parts["smooth_factor"] = TensorSpec((k,), SIXTEEN_BIT)
            if rank:
                parts["proj_down"] = TensorSpec((k, rank), SIXTEEN_BIT)
                parts["proj_up"] = TensorSpec((n, rank), SIXTEEN_BIT)
            parts["act_mean"] = TensorSpec((k,), SIXTEEN_BIT, optional=True)
            parts["out_mean"] = TensorSpec((n,), (torch.float32,), optional=True)
        return MappingProxyType(parts)

    def nbytes(self, n: int, k: int, rank: int, optional: Container[str] = ()) -> int:
        """Size of such a layer with 16-bit tensors as such; of those that it may lack, the ones in `optional` count."""
        size = 0
        for name, part in self.parts(n, k, rank).items():
            if not part.optional or name in optional:
                dtype = torch.bfloat16 if torch.bfloat16 in part.dtypes else part.dtypes[0]
                size += torch.Size(part.shape).numel() * dtype.itemsize
        return size

    def encode_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """decode_weight(encode_weight(W)) = W up to half a code step: the nearest codes at absmax scales

        W (N, K) float32; `dtype` is that of 16-bit scales
        """
        raise NotImplementedError

    def decode_weight(self, tensors: Tensors) -> torch.Tensor:
        """W (N, K) float32, in the smoothed domain: code_values * wscales, and whatever else the format has"""
        raise NotImplementedError

    def code_values(self, nibbles: torch.Tensor) -> torch.Tensor:
        """What each code 0..15 stands for before its scale, float32."""
        raise NotImplementedError

    # -- the grid of the quantizer: step is what one code step of each group means, (..., K/group) float32

    def absmax_step(self, absmax: torch.Tensor) -> torch.Tensor:
        """The step at which the largest value of a group is the largest code."""
        raise NotImplementedError

    def upper_scale(self, absmax: torch.Tensor, searching: bool) -> torch.Tensor | None:
        """One scale for the whole tensor above those of its groups (absmax (N, K/group)); None where there is none

        searching  leave room for steps larger than absmax_step
        """
        return None

    def candidates(
        self, absmax: torch.Tensor, upper: torch.Tensor | None, dtype: torch.dtype
    ) -> Iterable[torch.Tensor]:
        """Steps worth trying for groups of this absmax, exactly as they will be stored."""
        yield self.store_step(self.absmax_step(absmax), upper, dtype)[0]

    def store_step(
        self, step: torch.Tensor, upper: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(step as the stored scales multiply, the scale tensors of the checkpoint) of step (N, K/group)"""
        stored = step.to(dtype)
        return stored.float(), {"wscales": stored.T.contiguous()}

    def nearest(self, values: torch.Tensor, step: torch.Tensor, every_code: bool = True) -> torch.Tensor:
        """The grid point next to each value; `step` broadcasts

        every_code  also a code that `encode_weight` leaves out
        """
        raise NotImplementedError

    def codes_of(self, multiples: torch.Tensor) -> torch.Tensor:
        """Codes of values that are grid points at step 1, up to float error; any integer dtype."""
        raise NotImplementedError

    # -- activations

    def quantize_activation(
        self, x: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0), rule: str = STOCK_RULE
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(nibbles (M, K) uint8, ascales (M, K/group)) of a smoothed, shifted x (M, K)

        NaN and Inf make their group's scale NaN.
        """
        raise NotImplementedError

    def decode_activation(
        self, codes: torch.Tensor, ascales: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0)
    ) -> torch.Tensor:
        """(M, K) float32. Inverse of `quantize_activation`, up to its rounding."""
        raise NotImplementedError

    def round_activation(self, x: torch.Tensor, act_unsigned: tuple[int, int], rule: str) -> torch.Tensor:
        """decode_activation(quantize_activation(x)) (M, K) float32; a format may know a shorter way to the same bits"""
        return self.decode_activation(*self.quantize_activation(x, act_unsigned, rule), act_unsigned)

    def act_steps(self, rule: str, unsigned: bool) -> float:
        """Code steps from zero to the extreme of an activation group."""
        return 15.0 if unsigned else 7.0 if rule == STOCK_RULE else 8.0

    def rounding_noise(self, groups: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """(K/group, group or 1) sum over rows of extreme^2 / (12 steps^2), the expected squared error of rounding

        groups  (M, K/group, group) magnitudes
        steps   (K/group,) from zero to the group's extreme
        """
        extreme = groups.amax(-1, keepdim=True)
        return extreme.square().sum(0) / (12 * steps.square()[:, None])

    # -- 8-bit rows

    def expand_rows(self, tensors: Tensors, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
        """W[n, k] = weight[n, k] * row_scales[n]: (weight (N, K) int8 or float8_e4m3fn, row_scales (N,) float32)

        The row scale comes from the group scales alone: the largest of them, divided by the unit.
        raises  ValueError for a format without such rows

            >>> stored = FORMATS["int4"].encode_weight(torch.tensor([[7.0] * 64 + [3.5] * 64]), torch.bfloat16)
            >>> weight, row_scales = FORMATS["int4"].expand_rows(stored)
            >>> weight[0, 0].item(), weight[0, -1].item()  # code 7 at 15 and at 7.5 a step
            (105, 52)
        """
        if dtype not in self.units:
            raise ValueError(f"a {self.name} weight cannot be expanded to one scale per row in {dtype}")
        qweight, scales = tensors["qweight"], tensors["wscales"].float().T
        largest = scales.abs().amax(-1, keepdim=True)
        unit = torch.full_like(largest, float(self.units[dtype]))
        steps = (scales * torch.where(largest == 0, 0.0, unit / largest))[..., None]  # (N, K/group, 1)
        weight = torch.empty(scales.shape[0], 2 * qweight.shape[1], dtype=dtype, device=qweight.device)
        rows = EXPANDED_ROWS if qweight.device.type == "cpu" else max(1, len(weight))
        for first in range(0, len(weight), rows):
            part = slice(first, first + rows)
            values = self.code_values(unpack(qweight[part])).unflatten(-1, (scales.shape[1], -1)) * steps[part]
            weight[part] = (values.round_() if dtype == torch.int8 else values).flatten(-2)
        row_scales = (largest / unit)[:, 0]
        for name in ("wtscale", "wcscales"):
            if name in tensors:
                row_scales = row_scales * tensors[name].float()
        return weight, row_scales


def by_group(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """(..., K) -> (..., K/group_size, group_size). Raises ValueError if K is not a multiple of the group."""
    if x.shape[-1] % group_size:
        raise ValueError(f"K={x.shape[-1]} is not a multiple of the group of {group_size} input channels")
    return x.unflatten(-1, (-1, group_size))


def all_finite(*parts: torch.Tensor) -> bool:
    """Whether the sum over all parts is finite: then every element is (else they may be, and the long way is taken)"""
    return all(bool(part.sum().isfinite()) for part in parts)


FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in modules(sys.modules[__name__])}


def format_named(name: str) -> Format:
    """FORMATS[name]. Raises ValueError that names the known ones."""
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}, known are {', '.join(FORMATS)}")
    return FORMATS[name]
