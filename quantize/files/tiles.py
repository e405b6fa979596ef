"""Order of numbers in memory: the tiles of other engines <-> natural order, each bijection beside its inverse.

Nunchaku stores every tensor of a W4A4 layer in the order in which the lanes of a warp read it. Letters of the patterns:

    t   tile of 128 output rows             kt  tile of 64 input columns
    a   block of 16 rows in the tile        q   half of the 64 columns (or quarter of a block, for vectors)
    h   half of the 16 rows                 l   8 columns in the half
    r   row in the half                     j   two neighbours

Natural order is what the rest of the pack knows: qweight (N, K/2), wscales (K/group, N), proj_down (K, R),
proj_up (N, R), vectors by channel. N and K are the stored, padded sizes here (multiples of 128).
Source: the packers of Nunchaku and comfy-kitchen, checked bit by bit against their output.
"""

import torch
from einops import rearrange

from ...kernels.layer import RANK_TILE

TILE = 128  # rows and columns that Nunchaku pads to
INTERLEAVE = 4  # rows that stand side by side in a tile-packed weight of comfy-kitchen

QWEIGHT_TILES = "(t kt a r l h q) -> (t a h r) (kt q l)"
VECTOR_TILES = "(t a q h j) -> (t a h q j)"
INT4_SCALE_TILES = "(t g a q h) -> g (t a h q)"  # of pairs j
NVFP4_SCALE_TILES = "(t kt r q p c) -> (kt c) (t p q r)"
# 16 x 16 blocks, channel block slowest; `up` has channels as block rows, `down` as block columns
PROJ_UP_TILES = "(cb rb row pair rowhalf colhalf j) -> (cb rowhalf row) (rb colhalf pair j)"
PROJ_DOWN_TILES = "(cb rb row pair rowhalf colhalf j) -> (cb colhalf pair j) (rb rowhalf row)"
# a 16-bit word holds four codes that stand eight columns apart: byte b of neighbours (even, odd)
AWQ_TILES = "(nq kg i half pair odd b) -> odd (nq i) (kg half b) pair"

AWQ_PIECE = 1 << 20  # bytes that are unpacked at once: what is in between is several times as large


def _inverse(pattern: str) -> str:
    left, right = pattern.split(" -> ")
    return f"{right} -> {left}"


def _move(tensor: torch.Tensor, pattern: str, **sizes: int) -> torch.Tensor:
    """einops.rearrange into contiguous memory, for any dtype and device.

    On the CPU numpy does the copying: at runs of two to eight elements it is several times faster than torch.
    """
    if tensor.device.type != "cpu":
        return rearrange(tensor, pattern, **sizes).contiguous()
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    moved = rearrange(tensor.detach().view(same_size).numpy(), pattern, **sizes)
    return torch.from_numpy(moved).contiguous().view(tensor.dtype)


def _words(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of `packed` in memory order as a vector of `dtype`."""
    flat = packed.contiguous().reshape(-1).view(torch.uint8)
    return (flat.clone() if flat.storage_offset() % dtype.itemsize else flat).view(dtype)


def _pair(dtype: torch.dtype) -> torch.dtype:
    """An integer as large as two elements."""
    return {2: torch.int32, 4: torch.int64}[dtype.itemsize]


def unpack_qweight(packed: torch.Tensor) -> torch.Tensor:
    """(N, K/2) int8 in tiles -> (N, K/2) int8, low nibble = even column. Inverse: `pack_qweight`.

    Eight neighbouring codes of a row stay together in a 32-bit word, so whole words move.
    """
    tiles, words = packed.shape[0] // TILE, _words(packed, torch.int32)
    sizes = {"a": 8, "h": 2, "r": 8, "q": 2, "l": 4}
    if packed.device.type != "cpu":
        return _move(words, QWEIGHT_TILES, t=tiles, **sizes).view(torch.int8)
    # all tiles are alike: to gather by the order of one is twice as fast as to move words one axis at a time
    order = rearrange(torch.arange(len(words) // tiles).numpy(), QWEIGHT_TILES, t=1, **sizes).reshape(-1)
    gathered = torch.empty(tiles, len(order), dtype=torch.int32)
    words.view(tiles, -1).numpy().take(order, axis=1, out=gathered.numpy(), mode="clip")  # "raise" would buffer
    return gathered.view(torch.int8).view(packed.shape)


def pack_qweight(qweight: torch.Tensor) -> torch.Tensor:
    """(N, K/2) int8 natural -> (N, K/2) int8 in tiles. Inverse: `unpack_qweight`."""
    words = _words(qweight, torch.int32).view(qweight.shape[0], -1)
    tiles = _move(words, _inverse(QWEIGHT_TILES), a=8, h=2, r=8, q=2, l=4)
    return tiles.view(torch.int8).view(qweight.shape)


def unpack_vector(packed: torch.Tensor) -> torch.Tensor:
    """(C,) in tiles -> (C,) by channel: bias, smooth, wcscales. Inverse: `pack_vector`."""
    return _move(packed, VECTOR_TILES, a=8, h=2, q=4, j=2)


def pack_vector(vector: torch.Tensor) -> torch.Tensor:
    """(C,) by channel -> (C,) in tiles. Inverse: `unpack_vector`."""
    return _move(vector, _inverse(VECTOR_TILES), a=8, h=2, q=4, j=2)


def unpack_int4_scales(packed: torch.Tensor) -> torch.Tensor:
    """(K/64, N) in tiles -> (K/64, N) natural; in memory the tile is slowest. Inverse: `pack_int4_scales`."""
    pairs = _move(_words(packed, _pair(packed.dtype)), INT4_SCALE_TILES, g=packed.shape[0], a=8, h=2, q=4)
    return pairs.view(packed.dtype)


def pack_int4_scales(wscales: torch.Tensor) -> torch.Tensor:
    """(K/64, N) natural -> (K/64, N) in tiles. Inverse: `unpack_int4_scales`."""
    pairs = _words(wscales, _pair(wscales.dtype)).view(wscales.shape[0], -1)
    return _move(pairs, _inverse(INT4_SCALE_TILES), a=8, h=2, q=4).view(wscales.dtype).view(wscales.shape)


def unpack_nvfp4_scales(packed: torch.Tensor) -> torch.Tensor:
    """(K/16, N) one byte each, in tiles -> (K/16, N) natural. Inverse: `pack_nvfp4_scales`."""
    sizes = {"t": packed.shape[1] // TILE, "r": 8, "q": 4, "p": 4, "c": 4}
    return _move(_words(packed, torch.uint8), NVFP4_SCALE_TILES, **sizes).view(packed.dtype)


def pack_nvfp4_scales(wscales: torch.Tensor) -> torch.Tensor:
    """(K/16, N) one byte each, natural -> (K/16, N) in tiles. Inverse: `unpack_nvfp4_scales`."""
    return _move(wscales, _inverse(NVFP4_SCALE_TILES), r=8, q=4, p=4, c=4).view(wscales.shape)


def unpack_proj_down(packed: torch.Tensor) -> torch.Tensor:
    """(K, R) in blocks -> (K, R) natural. Inverse: `pack_proj_down`."""
    return _unpack_blocks(packed, PROJ_DOWN_TILES)


def pack_proj_down(proj_down: torch.Tensor) -> torch.Tensor:
    """(K, R) natural -> (K, R) in blocks. Inverse: `unpack_proj_down`."""
    return _pack_blocks(proj_down, PROJ_DOWN_TILES)


def unpack_proj_up(packed: torch.Tensor) -> torch.Tensor:
    """(N, R) in blocks -> (N, R) natural. Inverse: `pack_proj_up`."""
    return _unpack_blocks(packed, PROJ_UP_TILES)


def pack_proj_up(proj_up: torch.Tensor) -> torch.Tensor:
    """(N, R) natural -> (N, R) in blocks. Inverse: `unpack_proj_up`."""
    return _pack_blocks(proj_up, PROJ_UP_TILES)


def _unpack_blocks(packed: torch.Tensor, pattern: str) -> torch.Tensor:
    sizes = {"cb": packed.shape[0] // RANK_TILE, "row": 8, "pair": 4, "rowhalf": 2, "colhalf": 2, "j": 2}
    return _move(packed.reshape(-1), pattern, **sizes)


def _pack_blocks(factor: torch.Tensor, pattern: str) -> torch.Tensor:
    return _move(factor, _inverse(pattern), row=8, pair=4, rowhalf=2, colhalf=2, j=2).view(factor.shape)


def unpack_awq(packed: torch.Tensor) -> torch.Tensor:
    """(N/4, K/2) int32 in tiles -> (N, K/2) int8, low nibble = even column. Inverse: `pack_awq`."""
    natural = torch.empty(packed.shape[0] * 4, packed.shape[1], dtype=torch.uint8, device=packed.device)
    step = max(1, AWQ_PIECE // packed[0].nbytes)
    for piece, rows in zip(packed.split(step), natural.split(step * 4), strict=True):
        sizes = {"nq": len(piece), "i": 4, "half": 2, "pair": 4, "odd": 2, "b": 2}
        even, odd = _move(_words(piece, torch.uint8), AWQ_TILES, **sizes)  # each (n, K/16, 4)
        codes = rows.view(len(rows), -1, 2, 4)
        codes[:, :, 0], codes[:, :, 1] = even & 15 | odd << 4, even >> 4 | odd & 0xF0
    return natural.view(torch.int8)


def pack_awq(qweight: torch.Tensor) -> torch.Tensor:
    """(N, K/2) int8 natural -> (N/4, K/2) int32 in tiles. Inverse: `unpack_awq`."""
    low, high = _move(qweight.view(torch.uint8), "n (c s pair) -> s n c pair", s=2, pair=4)
    words = torch.stack((low & 15 | high << 4, low >> 4 | high & 0xF0))
    tiles = _move(words, _inverse(AWQ_TILES), i=4, half=2, b=2, pair=4)
    return tiles.view(torch.int32).view(qweight.shape[0] // 4, qweight.shape[1])


def deinterleave_rows(rows: torch.Tensor, chunks: int) -> torch.Tensor:
    """row = channel * chunks + chunk -> row = chunk * channels + channel, over the first dimension

    How modulation layers lie: shift, scale, gate of one channel side by side. Inverse: `interleave_rows`.
    """
    return _move(rows, "(channel chunk) ... -> (chunk channel) ...", chunk=chunks)


def interleave_rows(rows: torch.Tensor, chunks: int) -> torch.Tensor:
    """row = chunk * channels + channel -> row = channel * chunks + chunk. Inverse: `deinterleave_rows`."""
    return _move(rows, "(chunk channel) ... -> (channel chunk) ...", chunk=chunks)


def unpack_kitchen_weight(packed: torch.Tensor) -> torch.Tensor:
    """(N/128, K/64, 32, 128) tile-packed -> (N, K/2) int8 natural. Inverse: `pack_kitchen_weight`."""
    return _move(packed, "t kg quad (i b) -> (t quad i) (kg b)", i=INTERLEAVE)


def pack_kitchen_weight(qweight: torch.Tensor) -> torch.Tensor:
    """(N, K/2) int8 natural -> (N/128, K/64, 32, 128) tile-packed. Inverse: `unpack_kitchen_weight`."""
    return _move(qweight, "(t quad i) (kg b) -> t kg quad (i b)", i=INTERLEAVE, quad=32, b=32)


def unpack_kitchen_rows(packed: torch.Tensor) -> torch.Tensor:
    """(N/128, X, 128) tile-packed -> (X, N): scales, X = K/64, and proj_up transposed. Inverse: `pack_kitchen_rows`."""
    return _move(packed, "t x n -> x (t n)")


def pack_kitchen_rows(rows: torch.Tensor) -> torch.Tensor:
    """(X, N) natural -> (N/128, X, 128) tile-packed. Inverse: `unpack_kitchen_rows`."""
    return _move(rows, "x (t n) -> t x n", n=TILE)
