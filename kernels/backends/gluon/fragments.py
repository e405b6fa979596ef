"""The weight in the order in which the lanes of a warp hand it to the INT4 tensor cores.

A warp works on 64 output channels. Lane l multiplies column l // 4 of each 8 columns and, of each group of 64 input
channels, the sixteen channels from 16 * (l % 4) on. Which sixteen is free as long as weight and activation agree: the
sum over a group does not care about order. This choice makes a lane's share 8 neighbouring bytes of the natural order,
so that the activation needs no packing at all. Used where N is odd, as the order pads it, and where the caller of
`int4_linear` has put the weight in this order before.
"""

from dataclasses import dataclass

import torch

from ...formats import GROUP_SIZE

COLUMNS = 64  # output channels of one warp
LANES = 32
TILE = 8  # columns of one tensor-core instruction
WORDS = GROUP_SIZE // 16  # 8-byte words of a row in one group


@dataclass(frozen=True)
class Fragments:
    """A weight in fragment order; N is padded with zeros to a multiple of 64.

    codes   (N/64, K/64, 4, 32, 2) int64: [tile, group, pair, lane, half] holds the eight bytes of column
            16 pair + 8 half + lane // 4 that start at byte 8 (lane % 4) of the group
    scales  (N/64, K/64, 4, 8, 2): [tile, group, lane % 4, column tile, parity] is the scale of column
            8 (column tile) + 2 (lane % 4) + parity, those of the columns whose sums the lane ends up with
    n       N before padding
    """

    codes: torch.Tensor
    scales: torch.Tensor
    n: int

    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def _pad_rows(tensor: torch.Tensor) -> torch.Tensor:
    missing = -tensor.shape[0] % COLUMNS
    return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:]))) if missing else tensor


def pack_fragments(qweight: torch.Tensor, wscales: torch.Tensor) -> Fragments:
    """Natural order to fragment order.

    qweight  (N, K/2) int8, low nibble = even column
    wscales  (K/64, N), any float dtype
    raises   ValueError if K is not a multiple of 64
    """
    n, half_k = qweight.shape
    if half_k * 2 % GROUP_SIZE:
        raise ValueError(f"K={half_k * 2} is not a multiple of the INT4 group of {GROUP_SIZE} input channels")
    words = _pad_rows(qweight.contiguous()).view(torch.int64)  # (N, K/16)
    words = words.view(-1, COLUMNS // TILE // 2, 2, TILE, half_k * 2 // GROUP_SIZE, WORDS)  # tile pair half n group t
    codes = words.permute(0, 4, 1, 3, 5, 2).flatten(3, 4)
    scales = _pad_rows(wscales.T.contiguous()).view(-1, COLUMNS // TILE, 4, 2, wscales.shape[0])  # tile nt t e g
    return Fragments(codes.contiguous(), scales.permute(0, 4, 2, 1, 3).contiguous(), n)
