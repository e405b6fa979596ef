"""Two 4-bit codes per byte, the even column in the low nibble; and matrices column by column."""

import torch


def pack(codes: torch.Tensor) -> torch.Tensor:
    """byte[..., j] = code[..., 2j] | code[..., 2j + 1] << 4

    codes    (..., K) any integer dtype; only the low four bits are kept (two's complement for signed codes)
    returns  (..., K/2) int8
    raises   ValueError if K is odd

        >>> pack(torch.tensor([1, -8, 7, 0]))  # 1 | 8 << 4 is 129, as int8 -127
        tensor([-127,    7], dtype=torch.int8)
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack {codes.shape[-1]} codes two to a byte: the last dimension must be even")
    nibbles = (codes & 15).to(torch.uint8)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).view(torch.int8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """code[..., 2j] = byte[..., j] & 15, code[..., 2j + 1] = byte[..., j] >> 4

    packed   (..., K/2) int8 or uint8
    returns  (..., K) uint8, values 0..15

        >>> unpack(torch.tensor([-127, 7], dtype=torch.int8))
        tensor([1, 8, 7, 0], dtype=torch.uint8)
    """
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def sign_extend(nibbles: torch.Tensor) -> torch.Tensor:
    """(nibble ^ 8) - 8: 0..7 stay, 8..15 become -8..-1. Returns int8

    >>> sign_extend(unpack(torch.tensor([-127, 7], dtype=torch.int8)))
    tensor([ 1, -8,  7,  0], dtype=torch.int8)
    """
    return ((nibbles.view(torch.int8) ^ 8) - 8) if nibbles.dtype == torch.uint8 else ((nibbles.to(torch.int8) ^ 8) - 8)


def by_column(matrix: torch.Tensor, multiple: int) -> torch.Tensor:
    """lines[n, g] = matrix[g, n], zero behind them up to a multiple of so many numbers

    >>> by_column(torch.tensor([[1, 2], [3, 4], [5, 6]]), 4)
    tensor([[1, 3, 5, 0],
            [2, 4, 6, 0]])
    """
    length, columns = matrix.shape
    lines = matrix.new_zeros(columns, length + -length % multiple)
    lines[:, :length] = matrix.t()
    return lines
