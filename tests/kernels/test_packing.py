"""Two codes per byte and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdquant_pack.kernels.packing import by_column, pack, sign_extend, unpack

shapes = st.tuples(st.integers(0, 5), st.integers(0, 9).map(lambda half: 2 * half))


@given(shapes, st.integers(0, 2**31))
def test_unpack_undoes_pack(shape, seed):
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes)), codes)


@given(shapes, st.integers(0, 2**31))
def test_signed_codes_survive(shape, seed):
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert torch.equal(sign_extend(unpack(pack(codes))), codes)


def test_the_even_column_is_the_low_nibble():
    assert pack(torch.tensor([[3, 12]], dtype=torch.uint8)).view(torch.uint8).item() == 3 | 12 << 4


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        pack(torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_codes_may_come_in_any_integer_dtype(dtype):
    codes = torch.arange(-8, 8, dtype=dtype)
    assert torch.equal(pack(codes), pack(codes.to(torch.int8)))
    assert torch.equal(sign_extend(unpack(pack(codes)).to(dtype)), codes.to(torch.int8))


@pytest.mark.parametrize(("length", "wanted"), [(0, 0), (1, 4), (4, 4), (5, 8)])
def test_columns_become_lines_with_zeros_behind_them(length, wanted):
    matrix = torch.arange(1, 1 + 3 * length).view(length, 3)
    lines = by_column(matrix, 4)
    assert lines.shape == (3, wanted)
    assert torch.equal(lines[:, :length].t(), matrix) and not lines[:, length:].any()
