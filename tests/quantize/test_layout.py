"""Every order of numbers has an inverse, and is the permutation that its index formula says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdquant_pack.quantize.files import tiles as layout

tiles = st.integers(1, 3)
seeds = st.integers(0, 2**31)


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return data.view(dtype).view(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


PAIRS = {  # name -> (unpack, pack, stored shape of (n, k) tiles, dtype)
    "qweight": (layout.unpack_qweight, layout.pack_qweight, lambda n, k: (128 * n, 64 * k), torch.int8),
    "vector": (layout.unpack_vector, layout.pack_vector, lambda n, k: (128 * n,), torch.bfloat16),
    "int4 scales": (layout.unpack_int4_scales, layout.pack_int4_scales, lambda n, k: (2 * k, 128 * n), torch.float16),
    "nvfp4 scales": (
        layout.unpack_nvfp4_scales,
        layout.pack_nvfp4_scales,
        lambda n, k: (8 * k, 128 * n),
        torch.float8_e4m3fn,
    ),
    "proj_down": (layout.unpack_proj_down, layout.pack_proj_down, lambda n, k: (128 * n, 16 * k), torch.bfloat16),
    "proj_up": (layout.unpack_proj_up, layout.pack_proj_up, lambda n, k: (128 * n, 16 * k), torch.float32),
    "awq": (layout.unpack_awq, layout.pack_awq, lambda n, k: (n, 32 * k), torch.int32),
    "kitchen weight": (
        layout.unpack_kitchen_weight,
        layout.pack_kitchen_weight,
        lambda n, k: (n, k, 32, 128),
        torch.int8,
    ),
    "kitchen rows": (layout.unpack_kitchen_rows, layout.pack_kitchen_rows, lambda n, k: (n, k, 128), torch.bfloat16),
}


@pytest.mark.parametrize("name", PAIRS)
@given(n=tiles, k=tiles, seed=seeds)
@settings(max_examples=12, deadline=None)
def test_packing_undoes_unpacking_and_the_other_way_round(name, n, k, seed):
    unpack, pack, shape, dtype = PAIRS[name]
    stored = random_bytes(shape(n, k), dtype, seed)
    natural = unpack(stored)
    assert same_bytes(pack(natural), stored)
    assert same_bytes(unpack(pack(natural)), natural)


@pytest.mark.parametrize("name", PAIRS)
def test_a_tensor_without_data_moves_as_well(name):
    """On another device than the CPU torch does the copying, which numpy does faster there."""
    unpack, pack, shape, dtype = PAIRS[name]
    stored = torch.empty(shape(2, 3), dtype=dtype, device="meta")
    natural, wanted = unpack(stored), unpack(random_bytes(shape(2, 3), dtype, 0))
    assert (natural.device.type, natural.shape, natural.dtype) == ("meta", wanted.shape, wanted.dtype)
    assert pack(natural).shape == stored.shape


@given(channels=st.integers(1, 9), chunks=st.sampled_from((2, 3, 6)), width=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_interleaving_undoes_deinterleaving(channels, chunks, width):
    rows = torch.arange(channels * chunks * width).view(channels * chunks, width)
    natural = layout.deinterleave_rows(rows, chunks)
    assert torch.equal(layout.interleave_rows(natural, chunks), rows)
    for channel in range(channels):
        for chunk in range(chunks):
            assert torch.equal(natural[chunk * channels + channel], rows[channel * chunks + chunk])


@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_qweight_follows_the_index_formula(seed):
    n, k = 256, 128
    stored = random_bytes((n, k // 2), torch.int8, seed)
    flat, natural = stored.view(torch.uint8).flatten(), layout.unpack_qweight(stored).view(torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    for row, column in zip(
        *(torch.randint(0, size, (50,), generator=generator).tolist() for size in (n, k)), strict=True
    ):
        t, a, h, r = row // 128, row % 128 // 16, row % 16 // 8, row % 8
        kt, q, l8, e = column // 64, column % 64 // 32, column % 32 // 8, column % 8
        word = ((((t * (k // 64) + kt) * 8 + a) * 8 + r) * 4 + l8) * 4 + 2 * h + q
        assert flat[4 * word + e // 2] >> 4 * (e % 2) & 15 == natural[row, column // 2] >> 4 * (column % 2) & 15


def test_awq_follows_the_index_formula():
    n, k = 8, 128
    stored = random_bytes((n // 4, k // 2), torch.int32, 3)
    words, natural = stored.flatten().view(torch.int16), layout.unpack_awq(stored).view(torch.uint8)
    for row in range(n):
        for column in range(k):
            word = ((row // 4) * (k // 64) + column // 64) * 64 + row % 4 * 16 + column % 64 // 32 * 8 + column % 8
            code = words[word].item() >> 4 * (column % 32 // 8) & 15
            assert code == natural[row, column // 2].item() >> 4 * (column % 2) & 15


@pytest.mark.parametrize("piece", [1, 100, 1000])
def test_a_large_modulation_weight_is_unpacked_piece_by_piece(piece, monkeypatch):
    stored = random_bytes((7, 64), torch.int32, 1)
    whole = layout.unpack_awq(stored)
    monkeypatch.setattr(layout, "AWQ_PIECE", piece)
    assert torch.equal(layout.unpack_awq(stored), whole)


@pytest.mark.parametrize("first", [0, 1, 2, 4])
def test_a_weight_may_begin_at_any_byte(first):
    """Tensors of a file lie where the one before ends; words of four bytes cannot be read from every address."""
    raw = random_bytes((first + 128 * 64,), torch.int8, 0)
    lying, copied = raw[first:].view(128, 64), raw[first:].clone().view(128, 64)
    assert torch.equal(layout.unpack_qweight(lying), layout.unpack_qweight(copied))


def test_scales_and_vectors_follow_the_index_formula():
    n, groups = 256, 4
    stored = torch.arange(groups * n, dtype=torch.int32).view(groups, n)
    int4, nvfp4 = layout.unpack_int4_scales(stored), torch.arange(groups * 128).remainder(251).to(torch.uint8)
    nvfp4_natural = layout.unpack_nvfp4_scales(nvfp4.view(groups, 128))
    vector = layout.unpack_vector(torch.arange(n))
    for row in range(n):
        slot = row % 128 // 16 * 16 + row % 8 // 2 * 4 + row % 16 // 8 * 2 + row % 2
        assert vector[row] == row // 128 * 128 + slot
        for group in range(groups):
            assert int4[group, row] == (row // 128 * groups + group) * 128 + slot
            if row < 128:
                byte = ((row % 8 * 4 + row % 32 // 8) * 4 + row // 32) * 4 + group
                assert nvfp4_natural[group, row] == nvfp4[byte]


def test_low_rank_blocks_follow_the_index_formula():
    channels, rank = 32, 32
    stored = torch.arange(channels * rank).view(channels, rank)
    up, down = layout.unpack_proj_up(stored), layout.unpack_proj_down(stored)
    for channel in range(channels):
        for column in range(rank):
            block = (channel // 16 * (rank // 16) + column // 16) * 256
            for natural, row, col in ((up, channel % 16, column % 16), (down, column % 16, channel % 16)):
                place = ((row % 8 * 4 + col % 8 // 2) * 2 + row // 8) * 4 + col // 8 * 2 + col % 2
                assert natural[channel, column] == block + place
