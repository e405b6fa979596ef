"""Decoded weights are kept while, and only while, the bytes they come from are there."""

import gc

import pytest
import torch

from svdquant_pack.kernels import svdquant_linear, weight_cache
from svdquant_pack.kernels.backends import reference
from svdquant_pack.kernels.layer import Layer, from_blob, to_blob
from svdquant_pack.kernels.weight_cache import WeightCache
from svdquant_pack.tests.kernels.layers import random_layer


def cache_of(nbytes: int) -> WeightCache:
    return WeightCache(lambda: nbytes)


def get(cache: WeightCache, source: torch.Tensor, made: list, variant: tuple = (), nbytes: int = 10) -> torch.Tensor:
    def compute() -> torch.Tensor:
        made.append(1)
        return source.float() * 2

    return cache.get(source, variant, compute, nbytes)


def test_a_second_look_computes_nothing():
    cache, made, source = cache_of(100), [], torch.arange(64, dtype=torch.uint8)
    first, second = get(cache, source, made), get(cache, source, made)
    assert first is second and len(made) == 1 and cache.nbytes == 10
    get(cache, source, made, ("another",))
    assert len(made) == 2


def test_views_made_anew_are_the_same_bytes():
    """A host hands the bytes over as one tensor; the views of a call are gone after it."""
    cache, made, blob = cache_of(100), [], torch.arange(64, dtype=torch.uint8)
    for _ in range(3):
        get(cache, blob[16:32].view(torch.int8).view(4, 4), made)
    assert len(made) == 1
    get(cache, blob[32:48].view(torch.int8).view(4, 4), made)
    assert len(made) == 2


def test_it_keeps_nothing_alive_and_goes_with_the_bytes():
    cache, made, source = cache_of(100), [], torch.arange(64, dtype=torch.uint8)
    get(cache, source, made)
    del source
    gc.collect()
    assert cache.nbytes == 0


@pytest.mark.parametrize("write", ["in place", "behind its back"])
def test_overwritten_bytes_are_seen(write):
    cache, made, source = cache_of(100), [], torch.arange(64, dtype=torch.uint8)
    get(cache, source, made)
    if write == "in place":
        source[63] = 7
    else:
        source.numpy()[:] = 5  # no version counter knows of it
    value = get(cache, source, made)
    assert len(made) == 2 and torch.equal(value, source.float() * 2) and cache.nbytes == 10


def test_the_budget_holds_and_the_first_stay():
    cache, made = cache_of(25), []
    sources = [torch.full((8,), i, dtype=torch.uint8) for i in range(4)]
    for _ in range(2):
        for source in sources:
            get(cache, source, made)
    assert cache.nbytes == 20 and len(made) == 6  # two of four are kept, the other two computed each time


def test_what_nobody_uses_makes_room(monkeypatch):
    cache, made = cache_of(10), []
    old, new = torch.zeros(8, dtype=torch.uint8), torch.ones(8, dtype=torch.uint8)
    get(cache, old, made)
    get(cache, new, made)
    assert len(made) == 2
    monkeypatch.setattr(weight_cache, "IDLE_SECONDS", -1.0)
    get(cache, new, made)
    get(cache, new, made)
    assert len(made) == 3 and cache.nbytes == 10


@pytest.mark.parametrize("format", ["int4", "nvfp4", "awq_w4a16"])
def test_the_reference_gives_the_same_numbers_with_and_without(format, monkeypatch):
    layer, x = random_layer(format, dtype=torch.bfloat16), torch.randn(7, 256).bfloat16()
    kept, empty = cache_of(1 << 30), cache_of(0)
    results = []
    for cache in (empty, kept, kept):
        monkeypatch.setattr(reference, "ON_CPU", cache)
        results.append(svdquant_linear(x, layer, compute="auto" if format == "awq_w4a16" else "w4a4"))
    assert kept.nbytes == 4 * 96 * 256 and empty.nbytes == 0
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_a_packed_layer_is_decoded_once(monkeypatch):
    cache = cache_of(1 << 30)
    monkeypatch.setattr(reference, "ON_CPU", cache)
    layer = random_layer("int4")
    blob, views = to_blob(layer.tensors)
    calls = []
    monkeypatch.setattr(
        Layer, "decode_weight", lambda self: calls.append(1) or layer.spec.fmt.decode_weight(self.tensors)
    )
    for _ in range(3):
        svdquant_linear(torch.randn(2, 256), Layer(layer.spec, from_blob(blob, views)), compute="w4a4")
    assert len(calls) == 1
    del blob
    gc.collect()
    assert cache.nbytes == 0
