"""The order in which the tiles of a matrix product are computed."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tile_position(tile, M, N, ROWS: gl.constexpr, COLUMNS: gl.constexpr, BAND: gl.constexpr):
    """(tile row, tile column): down a band of rows before the next columns, so that both operands are found in L2."""
    tiles_m = gl.cdiv(M, ROWS)
    tiles_n = gl.cdiv(N, COLUMNS)
    band = tile // (BAND * tiles_n) * BAND
    height = gl.maximum(gl.minimum(tiles_m - band, BAND), 1)  # a tile past the last one has no position, nor a fault
    inside = tile % (BAND * tiles_n)
    return band + inside % height, inside // height
