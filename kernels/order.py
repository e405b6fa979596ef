"""The order of a layer's numbers in memory: natural, or one that a kernel reads faster.

    restore(arrange(tensors)) = tensors, exactly

An order moves elements within a tensor: shape, dtype and size stay, so that whoever moves, counts or streams the bytes
need not know. Files are always in natural order. A backend says which order it wants (Backend.order); everything else
gets natural numbers, put back where they are needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .formats import GROUP_SIZE

Move = Callable[[torch.Tensor], torch.Tensor]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Order:
    """How some of a layer's tensors lie; those that are not named are in natural order.

    rows   N has to be a multiple of it
    moves  {name of a tensor: (from natural order to this one, and back)}

        >>> order, natural = ORDERS["fragments"], {"wscales": torch.arange(64.0)[None]}
        >>> arranged = order.arrange(natural)
        >>> arranged["wscales"][0, :6]
        tensor([ 0.,  1.,  8.,  9., 16., 17.])
        >>> torch.equal(order.restore(arranged)["wscales"], natural["wscales"])
        True
    """

    rows: int
    moves: Mapping[str, tuple[Move, Move]]

    def arrange(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """From natural order. Inverse: `restore`."""
        return {name: self.moves[name][0](part) if name in self.moves else part for name, part in tensors.items()}

    def restore(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """To natural order. Inverse: `arrange`."""
        return {name: self.moves[name][1](part) if name in self.moves else part for name, part in tensors.items()}

    def restore_when_read(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """`restore`, for whom mostly wants names, shapes and sizes: the numbers are moved when they are looked at."""
        return {
            name: unread(part, self.moves[name][1]) if name in self.moves else part for name, part in tensors.items()
        }


class Unread(torch.Tensor):
    """A tensor on the CPU whose numbers are made, each time, by the operation that reads them.

    It has no memory to point at. It calls itself strided, so that who writes it to a file first makes it whole, by
    `contiguous`, or is told to.
    """

    whole: Callable[[], torch.Tensor]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(Unread, lambda each: each.whole(), (args, kwargs or {}))
        return func(*args, **kwargs)


def unread(source: torch.Tensor, move: Move) -> torch.Tensor:
    """move(source) on the CPU, not yet computed; for a move that keeps shape and dtype."""
    strides = [2 * stride for stride in source.stride()]
    made = torch.Tensor._make_wrapper_subclass(Unread, source.shape, strides=strides, dtype=source.dtype)
    made.whole = lambda: move(source.cpu())
    return made


# Fragment order: what the lanes of a warp hand to the INT4 tensor cores, one lane's share after the other.
#
# A warp works on 64 output channels, lane l on column l // 4 of each 8; of each group of 64 input channels it hands
# over the eight from 8 (l % 4) and the eight from 32 + 8 (l % 4) on.
COLUMNS = 64  # output channels of one warp
TILE = 8  # columns of one tensor-core instruction
WORDS = GROUP_SIZE // 8  # 4-byte words of a row in one group


def to_fragments(qweight: torch.Tensor) -> torch.Tensor:
    """(N, K/2) int8; in memory int32 (N/64, K/64, 8, 32, 2)

    [tile, group, column tile, lane, half] is word 4 half + lane % 4 of the group's eight, of row 8 (column tile) +
    lane // 4 of the tile
    """
    words = qweight.contiguous().view(torch.int32)
    words = words.view(-1, COLUMNS // TILE, TILE, words.shape[1] // WORDS, 2, WORDS // 2)  # tile column n group half t
    return words.permute(0, 3, 1, 2, 5, 4).reshape(qweight.shape[0], -1).view(torch.int8)


def from_fragments(qweight: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_fragments`."""
    words = qweight.view(torch.int32)
    words = words.view(-1, words.shape[1] // WORDS, COLUMNS // TILE, TILE, WORDS // 2, 2)  # tile group column n t half
    return words.permute(0, 2, 3, 1, 5, 4).reshape(qweight.shape[0], -1).view(torch.int8)


def to_fragment_scales(wscales: torch.Tensor) -> torch.Tensor:
    """(K/64, N); in memory (N/64, K/64, 4, 8, 2)

    [tile, group, lane % 4, column tile, parity] is the scale of column 8 (column tile) + 2 (lane % 4) + parity, those
    of the columns whose sums the lane ends up with
    """
    parts = wscales.contiguous().view(wscales.shape[0], -1, COLUMNS // TILE, TILE // 2, 2)
    return parts.permute(1, 0, 3, 2, 4).reshape(wscales.shape)


def from_fragment_scales(wscales: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_fragment_scales`."""
    parts = wscales.view(-1, wscales.shape[0], TILE // 2, COLUMNS // TILE, 2)
    return parts.permute(1, 0, 3, 2, 4).reshape(wscales.shape)


ORDERS = {
    "fragments": Order(
        COLUMNS, {"qweight": (to_fragments, from_fragments), "wscales": (to_fragment_scales, from_fragment_scales)}
    )
}
