"""Budget: the greedy choice is the best one where that can be enumerated, sizes are met, reasons are given."""

import itertools

import pytest
import torch

from svdquant_pack.kernels import LayerSpec
from svdquant_pack.quantize.maker.decide import BudgetError, Unit, allocate
from svdquant_pack.quantize.maths.lowrank import tails

RANKS = range(0, 129, 16)


def unit(n, k, decay, start=0.01, sensitivity=1.0, format="int4") -> Unit:
    return Unit(LayerSpec(format, n, k), tuple(start * decay ** (rank / 16) for rank in RANKS), sensitivity)


UNITS = {"a": unit(256, 256, 0.5), "b": unit(512, 256, 0.9, 0.02), "c": unit(256, 256, 0.8, 0.004)}


def total_error(units, ranks) -> float:
    return sum(units[layer].sensitivity * units[layer].error[rank // 16] for layer, rank in ranks.items())


def test_greedy_is_close_to_the_best_of_all_choices():
    base = sum(one.bytes_at(0) for one in UNITS.values())
    for more in (0, 20_000, 60_000, 150_000):
        chosen = allocate(UNITS, base + more)
        assert chosen.bytes <= base + more
        best = min(
            total_error(UNITS, dict(zip(UNITS, ranks, strict=True)))
            for ranks in itertools.product(RANKS, repeat=3)
            if sum(one.bytes_at(rank) for one, rank in zip(UNITS.values(), ranks, strict=True)) <= base + more
        )
        assert total_error(UNITS, chosen.ranks) <= 1.1 * best


def test_steeper_and_more_sensitive_layers_get_more_rank():
    room = sum(one.bytes_at(32) for one in UNITS.values())
    assert allocate(UNITS, room).ranks["a"] > allocate(UNITS, room).ranks["c"]
    sensitive = UNITS | {"c": unit(256, 256, 0.8, 0.004, sensitivity=50)}
    assert allocate(sensitive, room).ranks["c"] > allocate(UNITS, room).ranks["c"]
    assert all(rank % 16 == 0 and rank <= 128 for rank in allocate(UNITS, 10 * room).ranks.values())


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_bytes_are_those_of_the_stored_layer(format):
    from svdquant_pack.tests.kernels.layers import random_layer

    for rank in (0, 16, 48):
        layer = random_layer(format, 96, 128, rank, dtype=torch.bfloat16, centred=True)
        optional = layer.tensors.get("wtscale", torch.empty(0)).nbytes  # four bytes that no budget needs
        assert unit(96, 128, 0.5, format=format).bytes_at(rank) == layer.nbytes() - optional


def test_the_worst_layers_fall_back_first_and_only_where_there_is_room():
    units = UNITS | {"bad": unit(256, 256, 1.0, 0.2), "worse": unit(256, 256, 1.0, 0.3)}
    base = sum(one.bytes_at(0) for one in units.values())
    chosen = allocate(units, base + 400_000, fallback=0.25)
    assert set(chosen.kept) == {"bad", "worse"} and "is above 0.25" in chosen.kept["worse"]
    assert chosen.bytes <= base + 400_000 and "bad" not in chosen.ranks
    one = 2 * 256 * 256 - units["bad"].bytes_at(0)
    assert set(allocate(units, base + one, fallback=0.25).kept) == {"worse"}
    assert not allocate(units, base + 400_000).kept


def test_a_size_that_cannot_be_met_says_which_can():
    with pytest.raises(BudgetError, match="raise target_size by"):
        allocate(UNITS, 1000)


def test_tails_are_the_singular_values_that_are_left():
    weight = torch.randn(400, 320, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.linspace(3, 0.1, 320))
    values = torch.linalg.svdvals(weight.double()).square()
    found = tails(weight, RANKS, 0)
    assert len(found) == len(RANKS) and found[0] == pytest.approx(1)
    for rank, tail in zip(RANKS, found, strict=True):
        assert tail == pytest.approx((values[rank:].sum() / values.sum()).item(), rel=0.06)  # two power steps
    assert tails(torch.zeros(64, 64), RANKS, 0)[0] <= 1
    exact = tails(torch.diag(torch.tensor([1.0, 3.0, 2.0])), (0, 1, 2, 3, 16), 0)
    assert exact == pytest.approx((1, 5 / 14, 1 / 14, 0, 0), abs=1e-6)
    few = tails(weight, (1, 60), 0)  # as many values as the largest of them needs
    assert few[1] == pytest.approx((values[60:].sum() / values.sum()).item(), rel=0.06)
