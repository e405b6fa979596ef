"""In the tests of this folder new memory is poisoned (conftest.py), so that what a kernel forgets to write is seen."""

import importlib

import pytest
import torch

from svdquant_pack.kernels.backends import reference
from svdquant_pack.kernels.backends.triton import versions
from svdquant_pack.kernels.stages import Coding
from svdquant_pack.tests.kernels.layers import random_layer

LARGEST = {torch.int8: 127, torch.uint8: 255, torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
WAYS = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "new_empty": lambda dtype: torch.ones(1).new_empty(3, 5, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.ones(3, 5), dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((3, 5), (5, 1), dtype=dtype),
}


@pytest.mark.parametrize("dtype", [*FLOATS, *LARGEST], ids=str)
@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_new_memory_is_poisoned(make, dtype):
    found = make(dtype)
    assert found.shape == (3, 5)
    assert (found == LARGEST[dtype]).all() if dtype in LARGEST else found.float().isnan().all()


def forgetful(x: torch.Tensor, layer, forgotten: tuple[int, int] | None) -> torch.Tensor:
    """A backend's `linear` that leaves one element of its output as it got it."""
    y = reference.linear(x, layer, None, None, "w4a16")
    out = y.new_empty(y.shape)
    written = torch.ones(y.shape, dtype=torch.bool)
    if forgotten is not None:
        written[forgotten] = False
    out[written] = y[written]
    return out


@pytest.mark.parametrize("forgotten", [(0, 0), (6, 63)])
def test_a_backend_that_forgets_one_element_fails_every_comparison(forgotten):
    layer = random_layer("int4", 64, 128, 16)
    x = torch.randn(7, 128)
    right = reference.linear(x, layer, None, None, "w4a16")
    torch.testing.assert_close(forgetful(x, layer, None), right)
    for _ in range(3):  # also where the right result lay a moment ago
        y = forgetful(x, layer, forgotten)
        assert y.isnan().sum() == 1 and y[forgotten].isnan()
        with pytest.raises(AssertionError):
            torch.testing.assert_close(y, right)
        assert not (y - right).abs().max() <= 1e9, "nor is it within any tolerance"


def test_what_the_pack_itself_allocates_is_poisoned(monkeypatch):
    """The host side of a real kernel, whose launch does nothing."""
    if reason := versions.missing():
        pytest.skip(reason)
    launch = importlib.import_module("svdquant_pack.kernels.backends.triton.launch")

    class Nothing:
        def __getitem__(self, grid):
            return lambda *arguments, **keywords: None

    monkeypatch.setattr(launch, "quantize_groups", Nothing())
    qact, ascales, _ = launch.quantize(torch.randn(5, 128), torch.ones(128), None, Coding("int4"))
    assert ascales.isnan().all() and (qact == 127).all()
