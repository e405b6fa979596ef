"""Terms of every form, one after another, against their formula on the dense weight; no host needed."""

import gc
import re

import pytest
import torch

from svdquant_pack.kernels.layer import LayerSpec
from svdquant_pack.quantize.linear import PackedLinear
from svdquant_pack.quantize.lora.deltas import Kron, LoraError
from svdquant_pack.quantize.lora.fit import LoraLimits
from svdquant_pack.quantize.lora.patched_weight import PatchedWeight
from svdquant_pack.quantize.lora.store import FactorStore, PlainLoras
from svdquant_pack.quantize.lora.terms import (
    DenseDelta,
    LohaFactors,
    LokrFactors,
    LoraFactors,
    Term,
    WeightFunction,
    grouped,
)
from svdquant_pack.quantize.maker.model import quantize_layer
from svdquant_pack.quantize.maths.layer import Dense, Making
from svdquant_pack.quantize.recipe import Recipe

N, K = 128, 192
EXACT = 1e-5  # float32 sums in another order
FITTED = 2e-3  # a millionth of a delta's energy is left out


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def term(form, strength: float = 1.0, own: float = 1.0, offset=None, tensors=None) -> Term:
    held = [value for value in vars(form).values() if isinstance(value, torch.Tensor)] if tensors is None else tensors
    identity = (type(form).__name__, *map(id, held), offset)
    return Term(form, type(form).__name__, identity, held, strength, own, offset, form)


def lora(n: int = N, k: int = K, rank: int = 4, seed: int = 0, **others) -> LoraFactors:
    extras = {"mid": None, "alpha": 0.5, "magnitude": None, "new_shape": None, "move_rows": None} | others
    return LoraFactors(0.05 * noise(n, rank, seed=seed), noise(rank, k, seed=seed + 1), **extras)


@pytest.fixture(scope="module", params=["int4", "int4 unsigned", "nvfp4"])
def packed(request) -> tuple[torch.Tensor, PackedLinear]:
    fmt, *unsigned = request.param.split()
    spec = LayerSpec(fmt, N, K, 16, (64, 192) if unsigned else (0, 0))
    dense = Dense(noise(N, K) / K**0.5, 0.1 * noise(N), spec)
    made = quantize_layer(dense, Making(Recipe(format=fmt, rank=16), torch.bfloat16))
    return PackedLinear.pack(made.layer, "w16")


def weight_of(packed, store: FactorStore | None = None, limits: LoraLimits | None = None) -> PatchedWeight:
    blob, linear = packed
    store = FactorStore() if store is None else store
    return PatchedWeight("layer", linear, blob, store, limits or LoraLimits(), torch.device("cpu"))


def dense(packed) -> torch.Tensor:
    return packed[1].layer(packed[0]).dense_weight()


def error(packed, terms, wanted: torch.Tensor) -> float:
    """||W' - wanted|| / ||wanted - W||"""
    base = dense(packed)
    found = weight_of(packed).loras(terms).dense_weight(base)
    return ((found - wanted).norm() / (wanted - base).norm()).item()


def swap(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat(rows.chunk(2)[::-1])


MID = noise(4, 4, seed=9)
FORMS = {
    "lora": (lora(), lambda f: f.up @ f.down),
    "mid": (lora(mid=MID), lambda f: f.up @ MID @ f.down),
    "rows": (lora(move_rows=swap), lambda f: swap(f.up @ f.down)),
    "loha": (
        LohaFactors((0.05 * noise(N, 4), noise(4, K)), (noise(N, 4, seed=5), noise(4, K, seed=6)), 0.5, None),
        lambda f: (f.first[0] @ f.first[1]) * (f.second[0] @ f.second[1]),
    ),
    "lokr": (LokrFactors((0.05 * noise(8, 8),), (noise(16, 24),), 0.5, None), lambda f: torch.kron(*f.left, *f.right)),
}


@pytest.mark.parametrize("strength", [1.0, -0.7])
@pytest.mark.parametrize("name", FORMS)
def test_exact_forms(packed, name, strength):
    form, delta = FORMS[name]
    assert error(packed, [term(form, strength)], dense(packed) + strength * 0.5 * delta(form)) < EXACT


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_dora_acts_on_the_weight_as_it_is_by_then(packed, axis, strength):
    """W' = V + s (diag(m / ||.||) (V + delta) - V), V = W + what came before"""
    before = lora(seed=20)
    value = dense(packed) + 0.5 * before.up @ before.down
    magnitude = 1 + 0.1 * (noise(N, 1) if axis == 0 else noise(1, K))
    form = lora(magnitude=magnitude)
    delta = 0.5 * form.up @ form.down
    norm = value.norm(dim=1, keepdim=True) if axis == 0 else (value + delta).norm(dim=0, keepdim=True)
    wanted = value + strength * (magnitude / norm * (value + delta) - value)
    assert error(packed, [term(before), term(form, strength)], wanted) < EXACT


def test_a_term_may_scale_the_weight_itself(packed):
    value, form = dense(packed), lora()
    wanted = 0.75 * (value + 0.5 * form.up @ form.down) + 0.4 * 0.5 * form.up @ form.down
    assert error(packed, [term(form), term(form, 0.4, own=0.75)], wanted) < EXACT
    rows = value.clone()
    rows[32:96] *= 0.5
    assert error(packed, [Term(None, "own", ("own",), [], 0.0, 0.5, (0, 32, 64), None)], rows) < EXACT


def test_a_dense_delta_is_made_once_for_all_strengths(packed):
    store, asked, delta = FactorStore(), [], 0.1 * noise(N, 3) @ noise(3, K)
    form = DenseDelta(lambda zeros, weight: (asked.append(weight), zeros + delta)[1], reads_weight=False)
    for strength in (1.0, 0.2):
        found = weight_of(packed, store).loras([term(form, strength, tensors=[delta])]).dense_weight(dense(packed))
        assert ((found - dense(packed) - strength * delta).norm() / (strength * delta).norm()) < FITTED
    assert asked == [None]
    reading = DenseDelta(lambda zeros, weight: (asked.append(weight), zeros + delta)[1], reads_weight=True)
    weight_of(packed).loras([term(reading, tensors=[delta])])
    assert torch.equal(asked[-1], dense(packed))


def test_a_weight_function_is_made_anew_when_what_comes_before_it_changes(packed):
    store, seen, kept = FactorStore(), [], torch.zeros(1)

    def half(weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight.clone())
        weight[:8] *= 0.5  # it may write into its argument
        return weight

    first, limits = lora(), LoraLimits(max_lost=1.0)
    for strength in (1.0, 1.0, 0.2):
        terms = [term(first, strength), term(WeightFunction(half), tensors=[kept])]
        found = weight_of(packed, store, limits).loras(terms).dense_weight(dense(packed))
        wanted = dense(packed) + strength * 0.5 * first.up @ first.down
        wanted[:8] *= 0.5
        assert ((found - wanted).norm() / wanted.norm()) < FITTED
    assert len(seen) == 2


def test_narrow_slices_share_a_block(packed):
    forms = [lora(N // 4, K, seed=seed) for seed in range(3)]
    terms = [term(form, 0.8, offset=(0, 32 * place, 32)) for place, form in enumerate(forms)]
    assert [len(group) for group in grouped(terms)] == [3]
    weight = weight_of(packed)
    assert weight.loras(terms).rank == 16
    assert [note.columns for note in weight.notes] == [16, 0, 0]
    assert weight.notes[0].milliseconds > 0, "counted once"
    assert [note.milliseconds for note in weight.notes[1:]] == [0, 0]
    wanted = dense(packed)
    for place, form in enumerate(forms):
        wanted[32 * place : 32 * place + 32] += 0.8 * 0.5 * form.up @ form.down
    assert error(packed, terms, wanted) < EXACT


@pytest.mark.parametrize(
    "other",
    [
        term(lora(32), 0.7, offset=(0, 32, 32)),  # another strength
        term(lora(32, alpha=0.25), 0.8, offset=(0, 32, 32)),
        term(lora(32), 0.8, offset=(0, 16, 32)),  # they overlap
        term(lora(N, 32), 0.8, offset=(1, 32, 32)),  # another dimension
        term(lora(32, rank=16), 0.8, offset=(0, 32, 32)),  # it fills a block
        term(lora(32, mid=MID), 0.8, offset=(0, 32, 32)),
        term(lora(32), 0.8, own=0.5, offset=(0, 32, 32)),
        term(lora(), 0.8),
    ],
)
def test_what_cannot_share_a_block(other):
    first = term(lora(32), 0.8, offset=(0, 0, 32))
    assert len(grouped([first, other])) == len(grouped([other, first])) == 2


def test_a_slice_joins_the_one_before_it():
    rows = [term(lora(32), strength, offset=(0, start, 32)) for start, strength in ((0, 0.5), (32, 0.8), (64, 0.8))]
    assert grouped(rows) == [rows[:1], rows[1:]]


def test_the_store_makes_nothing_twice_and_forgets_with_the_file(packed):
    store, forms = FactorStore(), [lora(seed=50, magnitude=1 + 0.1 * noise(N, 1)), lora(seed=40)]
    first, again = (weight_of(packed, store).loras([term(form, s) for form in forms]) for s in (1.0, 1.0))
    assert all(one is other for one, other in zip(first.deltas, again.deltas, strict=True))
    weaker = weight_of(packed, store).loras([term(form, 0.5) for form in forms])
    assert all(one is other for one, other in zip(first.deltas, weaker.deltas, strict=True))
    assert weaker.scales == (0.25, 0.25)
    assert len(store) == 3, "two deltas and the DoRA's vectors"
    del forms
    gc.collect()
    assert len(store) == 0


def test_plain_loras_come_back_at_other_strengths_until_the_file_is_gone(packed):
    store, form = FactorStore(), lora(seed=60)
    loras, identity = weight_of(packed, store).loras([term(form)]), (id(form.up), id(form.down))
    store.remember("layer", PlainLoras(identity, loras.deltas, (form.alpha,)), [form.up, form.down])
    weaker = store.at_strengths("layer", identity, [0.25])
    assert weaker.deltas is loras.deltas and weaker.scales == (0.125,)
    assert store.at_strengths("layer", (1, 2), [0.25]) is None and store.at_strengths("other", identity, [1.0]) is None
    del form
    gc.collect()
    assert store.at_strengths("layer", identity, [0.25]) is None and len(store) == 0


def test_rows_beside_an_unsigned_shift(packed):
    form = lora(magnitude=1 + 0.1 * noise(N, 1))
    loras = weight_of(packed).loras([term(form)])
    assert (loras.shift is None) == (packed[1].spec.act_unsigned == (0, 0))


def test_no_terms_are_no_loras(packed):
    assert weight_of(packed).loras([]) is None


def test_a_weight_starts_without_a_past(packed):
    blob, linear = packed
    with pytest.raises(TypeError):
        PatchedWeight("layer", linear, blob, FactorStore(), LoraLimits(), torch.device("cpu"), [])


BAD = {
    "of another model": (lora(64), "trained for another model"),
    "wider": (lora(new_shape=(N, 2 * K)), "widens the weight from"),
    "half a LoKr": (LokrFactors((noise(8, 8),), (None, noise(4, 24)), 1.0, None), "lacks a factor"),
    "full": (DenseDelta(lambda zeros, _: zeros + noise(N, K), False), "nearest 16 columns keep"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_applied_is_refused_by_kind(packed, name):
    form, words = BAD[name]
    with pytest.raises(LoraError, match=f"the patch of kind '{type(form).__name__}'.*{words}"):
        weight_of(packed, limits=LoraLimits(max_rank=16)).loras([term(form)])


def test_a_kronecker_product_of_full_rank_takes_no_columns(packed):
    weight = weight_of(packed)
    loras = weight.loras([term(FORMS["lokr"][0])])
    assert isinstance(loras.deltas[0], Kron) and loras.rank == 0
    assert [(note.kind, note.columns, note.kept) for note in weight.notes] == [("LokrFactors", 0, 1.0)]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_by_name(packed, number):
    numbers = {
        "strength": term(lora(), number),
        "strength of the model": term(lora(), own=number),
        "alpha over its rank": term(lora(alpha=number)),
    }
    for name, bad in numbers.items():
        with pytest.raises(LoraError, match=f"LoraFactors.*the {name} is {number}"):
            weight_of(packed).loras([bad])
    store, plain = FactorStore(), weight_of(packed).loras([term(lora())])
    store.remember("layer", PlainLoras((1,), plain.deltas, (0.5,)), [])
    assert store.at_strengths("layer", (1,), [2.0]).scales == (1.0,)
    assert store.at_strengths("layer", (1,), [number]) is None


def test_a_plain_lora_leaves_the_weight_itself_alone(packed):
    loras = weight_of(packed).loras([term(lora())])
    assert loras.rows is None and loras.cols is None and loras.shift is None


@pytest.mark.parametrize("own", [0.0, 1.5, -1.0])
@pytest.mark.parametrize("offset", [None, (0, 32, 64), (1, 96, 96)])
def test_a_term_may_take_the_weight_itself_away_or_have_more_of_it(packed, offset, own):
    wanted = dense(packed).clone()
    (wanted if offset is None else wanted.narrow(*offset)).mul_(own)
    found = weight_of(packed).loras([Term(None, "own", ("own",), [], 0.0, own, offset, None)])
    assert torch.equal(found.dense_weight(dense(packed)), wanted)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_on_a_slice_along_its_axis(packed, axis):
    """The rows or columns outside the slice are those of the weight."""
    size = (N, K)[axis]
    part = (axis, size // 2, size // 4)
    n, k = (part[2], K) if axis == 0 else (N, part[2])
    form = lora(n, k, magnitude=1 + 0.1 * (noise(n, 1) if axis == 0 else noise(1, k)))
    value, delta = dense(packed).clone(), 0.5 * form.up @ form.down
    inside = value.narrow(*part)
    norm = inside.norm(dim=1, keepdim=True) if axis == 0 else (inside + delta).norm(dim=0, keepdim=True)
    inside.copy_(form.magnitude / norm * (inside + delta))
    assert error(packed, [term(form, offset=part)], value) < EXACT


@pytest.mark.parametrize("kind", [LoraFactors, LohaFactors, LokrFactors, DenseDelta, WeightFunction, Term])
def test_terms_are_told_apart_as_objects_and_stay_as_they_are(kind):
    """What is made of them is kept under them: equal numbers are no reason to mix two files up."""
    names = kind.__dataclass_fields__
    one, other = (kind(**dict.fromkeys(names, torch.ones(2))) for _ in range(2))
    assert one != other and len({one, other}) == 2
    with pytest.raises(AttributeError):
        setattr(one, next(iter(names)), None)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("starts", [(0, 32), (32, 0), (0, 96)])
def test_slices_share_a_block_in_any_order_and_up_to_the_edge(dim, starts):
    sizes = (32, K) if dim == 0 else (N, 32)
    terms = [term(lora(*sizes, seed=start), offset=(dim, start, 32)) for start in starts]
    assert len(grouped(terms)) == 1
    overlapping = term(lora(*sizes), offset=(dim, starts[0] + 31, 32))
    assert len(grouped([terms[0], overlapping])) == len(grouped([overlapping, terms[0]])) == 2


def test_numbers_whose_products_would_overflow_are_refused_by_name(packed):
    for number in (1e6, -1e6):
        assert weight_of(packed).loras([term(lora(alpha=1e-6), number)]) is not None
        bad = {
            "strength": term(lora(), 2 * number),
            "strength of the model": term(lora(), own=2 * number),
            "alpha over its rank": term(lora(alpha=2 * number)),
        }
        for name, one in bad.items():
            with pytest.raises(LoraError, match=re.escape(f"the {name} is {2 * number:.3g}, at most 1e+06 is used")):
                weight_of(packed).loras([one])
