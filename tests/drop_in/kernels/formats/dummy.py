"""A number format in one file: uneven levels, 32 inputs to a scale, and a tensor that no other format has.

    W[n, k] = LEVELS[code[n, k]] * wscales[k / 32, n] + offsets[k / 32, n]

Every group's offset is a quarter of its scale, which brings level 8 to zero: the grid of a weight is GRID * scale.
Activations have the same grid without an offset, scale = absmax / 6. The quantizer needs the grid and what is stored
of a step; kernels that know nothing of the code multiply the int8 rows that `expand_rows` makes, see `units`.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch

from ..modes import W16, Mode
from ..packing import pack, unpack
from . import SIXTEEN_BIT, STOCK_RULE, Format, Tensors, TensorSpec, by_group

GRID = (-7.0, -5.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
OFFSET = 0.25  # of a scale
SHRINKS = (1.0, 0.92, 0.85, 0.78)  # of absmax / 7, tried with both signs: the grid's ends are uneven
ACT_TOP = 6.0


def _nearest_index(multiples: torch.Tensor) -> torch.Tensor:
    """The index in GRID next to each value, int64"""
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(GRID)])
    return torch.bucketize(multiples.contiguous(), middles.to(multiples))


def _grid(index: torch.Tensor) -> torch.Tensor:
    return torch.tensor(GRID, device=index.device)[index.long()]


class Dummy(Format):
    name = "dummy"
    group_size = 32
    code = "uneven levels"
    units = {torch.int8: 16}  # noqa: RUF012 (typed in the base class)
    computes = ("w4a4", "w8a8", "w4a8-jit", "w16")
    modes = (Mode("cpu", "w4a4"), Mode("", "w4a8-jit"), W16)

    def weight_parts(self, n: int, k: int) -> dict[str, TensorSpec]:
        groups = k // self.group_size
        return {
            "qweight": TensorSpec((n, k // 2), (torch.int8,)),
            "wscales": TensorSpec((groups, n), SIXTEEN_BIT),
            "offsets": TensorSpec((groups, n), SIXTEEN_BIT),
        }

    def encode_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The nearest level at scale = absmax of the group / 7"""
        groups = by_group(weight.float(), self.group_size)
        step, stored = self.store_step(self.absmax_step(groups.abs().amax(-1)), None, dtype)
        codes = self.codes_of(groups / torch.where(step == 0, 1, step)[..., None])
        return {"qweight": pack(codes.flatten(-2)), **stored}

    def decode_weight(self, tensors: Tensors) -> torch.Tensor:
        levels = by_group(self.code_values(unpack(tensors["qweight"])), self.group_size)
        scales, offsets = (tensors[name].float().T[..., None] for name in ("wscales", "offsets"))
        return (levels * scales + offsets).flatten(-2)

    def code_values(self, nibbles: torch.Tensor) -> torch.Tensor:
        return _grid(nibbles) - OFFSET

    def absmax_step(self, absmax: torch.Tensor) -> torch.Tensor:
        return absmax / -GRID[0]

    def candidates(
        self, absmax: torch.Tensor, upper: torch.Tensor | None, dtype: torch.dtype
    ) -> Iterable[torch.Tensor]:
        for shrink in SHRINKS:
            for sign in (1, -1):
                yield (sign * shrink * self.absmax_step(absmax)).to(dtype).float()

    def store_step(
        self, step: torch.Tensor, upper: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        stored = step.to(dtype)
        scales = stored.T.contiguous()
        return stored.float(), {"wscales": scales, "offsets": scales * OFFSET}

    def nearest(self, values: torch.Tensor, step: torch.Tensor, every_code: bool = True) -> torch.Tensor:
        return _grid(_nearest_index(values / torch.where(step == 0, 1, step))) * step

    def codes_of(self, multiples: torch.Tensor) -> torch.Tensor:
        return _nearest_index(multiples).to(torch.uint8)

    def quantize_activation(
        self, x: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0), rule: str = STOCK_RULE
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = by_group(x.float(), self.group_size)
        absmax = groups.abs().amax(-1, keepdim=True)
        scales = torch.where(absmax.isfinite(), absmax, torch.nan) / ACT_TOP
        codes = _nearest_index(torch.nan_to_num(groups * torch.where(scales == 0, 0.0, 1 / scales)))
        return codes.to(torch.uint8).flatten(-2), scales[..., 0].to(x.dtype)

    def decode_activation(
        self, codes: torch.Tensor, ascales: torch.Tensor, act_unsigned: tuple[int, int] = (0, 0)
    ) -> torch.Tensor:
        return (by_group(_grid(codes), self.group_size) * ascales.float()[..., None]).flatten(-2)

    def act_steps(self, rule: str, unsigned: bool) -> float:
        return ACT_TOP

    def expand_rows(self, tensors: Tensors, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
        """As every format has it, with the offsets: a row's scale is its largest group scale / 16"""
        if dtype not in self.units:
            raise ValueError(f"a {self.name} weight cannot be expanded to one scale per row in {dtype}")
        largest = tensors["wscales"].float().abs().amax(0)
        row_scales = largest / self.units[dtype]
        weight = self.decode_weight(tensors) / torch.where(row_scales == 0, 1, row_scales)[:, None]
        return weight.round().to(dtype), row_scales


FORMAT = Dummy()
