"""A change of a weight in factored form: columns beside those of the low-rank branch, or a Kronecker product."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import pad as zero_pad

from ...kernels.layer import RANK_TILE

HALF = (torch.bfloat16, torch.float16, torch.float32)

Offset = tuple[int, int, int]
"""(dim, start, length): the rows (dim 0) or columns (dim 1) of a fused weight that a patch is for"""


LARGEST = 1e6  # of a factor, a strength or an alpha over its rank: four of them times an activation are a float32


class LoraError(ValueError):
    """A patch cannot be applied to a 4-bit layer. The message says why."""


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A factor as a matrix in a dtype that every backend takes: fp8 becomes bf16, which holds all its values."""
    if not isinstance(tensor, torch.Tensor):
        raise LoraError(f"a factor is of type {type(tensor).__name__}, needed a tensor")
    if tensor.ndim > 2:
        if tensor.shape[2:].numel() != 1:
            raise LoraError(f"a factor has shape {tuple(tensor.shape)}: it is of a convolution, the layer is linear")
        tensor = tensor.flatten(1)
    if tensor.dtype in HALF:
        return tensor
    return tensor.to(torch.bfloat16 if tensor.is_floating_point() and tensor.itemsize == 1 else torch.float32)


def check_finite(*factors: torch.Tensor) -> None:
    """Raise LoraError if a factor holds NaN or Inf, or numbers whose products are."""
    for factor in factors:
        if factor.numel():
            wide = factor.float() if factor.itemsize == 1 else factor  # torch compares no fp8
            low, high = (edge.item() for edge in wide.aminmax())  # NaN if there is one
            if not math.isfinite(high - low):
                raise LoraError("the LoRA holds NaN or Inf")
            if max(-low, high) > LARGEST:
                raise LoraError(f"the LoRA holds {max(-low, high):.3g}, at most {LARGEST:.0e} is used: it is damaged")


def scaled(weight: torch.Tensor, rows: torch.Tensor | None, cols: torch.Tensor | None) -> torch.Tensor:
    """diag(rows) @ weight @ diag(cols)"""
    if rows is not None:
        weight = weight * rows.to(weight)[:, None]
    return weight if cols is None else weight * cols.to(weight)


def placed(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """tensor.to(device, dtype). Outside inference mode no tensor of it: autograd could not save that for a gradient."""
    moved = tensor.to(device=device, dtype=dtype)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():  # a trace cannot ask the tensor
        return moved
    return moved.clone() if moved.is_inference() else moved


def span(offset: Offset | None, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((first row, rows), (first column, columns)) of the part of an (N, K) weight that a patch is for

    raises  LoraError if that part is not inside the weight
    """
    spans = [(0, shape[0]), (0, shape[1])]
    if offset is not None:
        dim, start, length = offset
        if dim not in (0, 1) or start < 0 or length < 1 or start + length > shape[dim]:
            raise LoraError(f"the LoRA is for the part {tuple(offset)} of a weight of shape {tuple(shape)}")
        spans[dim] = (start, length)
    return spans[0], spans[1]


@dataclass(frozen=True, eq=False)
class Columns:
    """delta = up @ down.T. down (K, R), up (N, R), in the dtype of the file; R a multiple of RANK_TILE."""

    down: torch.Tensor
    up: torch.Tensor

    @cached_property
    def rank(self) -> int:
        return self.down.shape[1]

    @cached_property
    def numel(self) -> int:
        return self.down.numel() + self.up.numel()

    def dense(self, n: int, k: int) -> torch.Tensor:
        """(N, K) float32"""
        return self.up.float() @ self.down.float().T

    def scaled(self, rows: torch.Tensor | None, cols: torch.Tensor | None) -> "Columns":
        """diag(rows) @ delta @ diag(cols)"""
        up = self.up if rows is None else self.up.float() * rows.to(self.up.device)[:, None]
        down = self.down if cols is None else self.down.float() * cols.to(self.down.device)[:, None]
        return Columns(down, up)


@dataclass(frozen=True, eq=False)
class Kron:
    """delta[rows, cols] = diag(row_factor) @ kron(left, right[0] @ right[1] ...) @ diag(col_factor)

    left   (a, b); right: one factor (c, d), or two (c, r) and (r, d). rows (start, a*c), cols (start, b*d)
    """

    left: torch.Tensor
    right: tuple[torch.Tensor, ...]
    rows: tuple[int, int]
    cols: tuple[int, int]
    row_factor: torch.Tensor | None = None
    col_factor: torch.Tensor | None = None

    rank = 0  # it takes no columns

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        factors = (self.row_factor, self.col_factor)
        return (self.left, *self.right, *(factor for factor in factors if factor is not None))

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Kron":
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return placed(tensor, device, dtype)

        row, col = (None if factor is None else move(factor) for factor in (self.row_factor, self.col_factor))
        return Kron(move(self.left), tuple(map(move, self.right)), self.rows, self.cols, row, col)

    def dense(self, n: int, k: int) -> torch.Tensor:
        """(N, K) float32"""
        right = self.right[0].float()
        for factor in self.right[1:]:
            right = right @ factor.float()
        delta = scaled(torch.kron(self.left.float(), right), self.row_factor, self.col_factor)
        return _placed(delta, self.rows, self.cols, (n, k))

    def scaled(self, rows: torch.Tensor | None, cols: torch.Tensor | None) -> "Kron":
        """diag(rows) @ delta @ diag(cols), with vectors of the whole layer"""
        row = None if rows is None else rows[self.rows[0] : sum(self.rows)]
        col = None if cols is None else cols[self.cols[0] : sum(self.cols)]
        row = self.row_factor if row is None else row if self.row_factor is None else row * self.row_factor
        col = self.col_factor if col is None else col if self.col_factor is None else col * self.col_factor
        return Kron(self.left, self.right, self.rows, self.cols, row, col)

    def add_to(self, y: torch.Tensor, x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
        """y + scale * x @ delta.T, without forming delta. x (..., K), y (..., N), a tensor of scale (1,) float32"""
        x = x.narrow(-1, *self.cols)
        if self.col_factor is not None:
            x = x * self.col_factor
        inner = x.unflatten(-1, (self.left.shape[1], -1))  # (..., b, d)
        for factor in reversed(self.right):
            inner = inner @ factor.T
        left = (self.left * scale).to(self.left.dtype)
        delta = (left @ inner).flatten(-2)  # (..., a, c)
        if self.row_factor is not None:
            delta = delta * self.row_factor
        if self.rows == (0, y.shape[-1]):
            return y + delta
        y = y.clone()
        y.narrow(-1, *self.rows).add_(delta)
        return y


Delta = Columns | Kron


def _placed(block: torch.Tensor, rows: tuple[int, int], cols: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """`block` inside zeros of `shape`."""
    (top, height), (left, width) = rows, cols
    return zero_pad(block, (left, shape[1] - left - width, top, shape[0] - top - height))


def columns_of(factors: Sequence[tuple[torch.Tensor, torch.Tensor, Offset | None]], shape: tuple[int, int]) -> Columns:
    """One block of columns for several (up (n, r), down (r, k), offset) on an (N, K) weight

    The width is a multiple of RANK_TILE. The factors are copied: a block never keeps a LoRA file in memory.
    raises  LoraError if factors do not fit the weight or hold NaN or Inf
    """
    checked = []
    for up, down, offset in factors:
        up, down = plain(up), plain(down)
        rows, cols = span(offset, shape)
        if up.ndim != 2 or down.ndim != 2 or up.shape != (rows[1], down.shape[0]) or down.shape[1] != cols[1]:
            raise LoraError(
                f"LoRA factors {tuple(up.shape)} and {tuple(down.shape)}, needed ({rows[1]}, r) and (r, {cols[1]}): "
                "it was trained for another model"
            )
        check_finite(up, down)
        checked.append((up, down, rows[0], cols[0]))
    width = sum(up.shape[1] for up, *_ in checked)
    width += -width % RANK_TILE
    dtypes = {tensor.dtype for up, down, *_ in checked for tensor in (up, down)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    block = Columns(torch.zeros(shape[1], width, dtype=dtype), torch.zeros(shape[0], width, dtype=dtype))
    first = 0
    for up, down, row, col in checked:
        last = first + up.shape[1]
        block.down[col : col + down.shape[1], first:last] = down.T
        block.up[row : row + up.shape[0], first:last] = up
        first = last
    return block
