"""LoRA deltas against the dense matrices that they stand for; no host needed."""

import pytest
import torch

from svdquant_pack.quantize.lora.deltas import Columns, Kron, LoraError, columns_of, placed, span
from svdquant_pack.quantize.lora.fit import LOHA_COLUMNS, LoraLimits, dora, fit, hadamard, kronecker
from svdquant_pack.quantize.lora.patched_weight import FactoredTerm
from svdquant_pack.quantize.lora.terms import DenseDelta, LohaFactors, LokrFactors, LoraFactors, Term, WeightFunction

N, K = 128, 192
EXACT = 1e-5  # float32 sums in another order


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float = EXACT) -> bool:
    return ((found - wanted).norm() / wanted.norm()).item() < bound


def test_columns_are_the_files_own_numbers_in_blocks_of_16():
    up, down = noise(N, 5).bfloat16(), noise(5, K, seed=1).bfloat16()
    delta = columns_of([(up, down, None)], (N, K))
    assert delta.rank == 16 and delta.up.dtype == torch.bfloat16
    assert torch.equal(delta.up[:, :5], up) and torch.equal(delta.down[:, :5], down.T)
    assert not delta.up[:, 5:].any() and not delta.down[:, 5:].any()


@pytest.mark.parametrize("dim", [0, 1])
def test_slices_share_a_block(dim):
    size = (N, K)[dim]
    factors, wanted = [], torch.zeros(N, K)
    for index, (start, length) in enumerate(((0, size // 4), (size // 2, size // 2))):
        n, k = (length, K) if dim == 0 else (N, length)
        up, down = noise(n, 4, seed=index), noise(4, k, seed=9 + index)
        factors.append((up, down, (dim, start, length)))
        wanted.narrow(dim, start, length).add_(up @ down)
    delta = columns_of(factors, (N, K))
    assert delta.rank == 16
    assert close(delta.dense(N, K), wanted)


def test_a_delta_does_not_keep_the_file_in_memory():
    up, down = noise(N, 16), noise(16, K)
    delta = columns_of([(up, down, None)], (N, K))
    assert delta.up.data_ptr() != up.data_ptr() and delta.down.data_ptr() != down.data_ptr()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_refused(bad):
    up = noise(N, 4)
    up[3, 2] = bad
    with pytest.raises(LoraError, match="NaN or Inf"):
        columns_of([(up, noise(4, K), None)], (N, K))


def test_a_slice_outside_the_weight_is_refused():
    with pytest.raises(LoraError, match="part"):
        columns_of([(noise(64, 4), noise(4, K), (0, 96, 64))], (N, K))


@pytest.mark.parametrize("ranks", [(4, 4), (16, 32), (32, 32)])
def test_hadamard_products(ranks):
    """Exact up to LOHA_COLUMNS; above, the matrix here is so small that its own rank suffices."""
    (a1, b1), (a2, b2) = ((noise(N, r, seed=r), noise(r, K, seed=r + 1)) for r in ranks)
    columns, kept = hadamard((a1, b1), (a2, b2), None, (N, K), LoraLimits())
    assert kept > 1 - 1e-6
    exact = ranks[0] * ranks[1] <= LOHA_COLUMNS
    assert close(columns.dense(N, K), (a1 @ b1) * (a2 @ b2), EXACT if exact else 1e-3)


KRONS = {
    "two whole": ((noise(8, 8),), (noise(16, 24),), Kron),
    "low right": ((noise(8, 8),), (noise(16, 4), noise(4, 24)), Columns),
    "low left": ((noise(8, 1), noise(1, 8)), (noise(16, 24),), Columns),
    "wide left": ((noise(16, 32),), (noise(8, 2), noise(2, 6)), Columns),
    "both": ((noise(8, 2), noise(2, 8)), (noise(16, 4), noise(4, 24)), Columns),
    "too wide": ((noise(32, 32),), (noise(4, 4), noise(4, 6)), Kron),
}


@pytest.mark.parametrize("name", KRONS)
def test_kronecker_products_in_either_form(name):
    left, right, form = KRONS[name]
    delta = kronecker(left, right, None, (N, K))
    assert isinstance(delta, form)
    wanted = torch.kron(
        torch.linalg.multi_dot(left) if len(left) > 1 else left[0], right[0] @ right[1] if len(right) > 1 else right[0]
    )
    assert close(delta.dense(N, K), wanted)
    if form is Kron:
        x, y = noise(3, 5, K), noise(3, 5, N)
        assert close(delta.add_to(y, x, -0.7), y - 0.7 * x @ wanted.T)
        rows, cols = noise(N), noise(K)
        bent = delta.scaled(rows, None).scaled(None, cols)
        assert close(bent.add_to(y, x, 1.0), y + x @ (rows[:, None] * wanted * cols).T)
        assert close(bent.dense(N, K), rows[:, None] * wanted * cols)


@pytest.mark.parametrize("offset", [(0, 32, 96), (1, 96, 96)])
def test_a_kronecker_product_on_a_slice(offset):
    n, k = (96, K) if offset[0] == 0 else (N, 96)
    delta = kronecker((noise(8, 8),), (noise(n // 8, k // 8),), offset, (N, K))
    x, y = noise(7, K), noise(7, N)
    assert close(delta.add_to(y, x, 2.0), y + 2 * x @ delta.dense(N, K).T)
    assert torch.equal(delta.dense(N, K).narrow(*offset), torch.kron(noise(8, 8), noise(n // 8, k // 8)))


def test_a_batch_as_long_as_a_slice_is_no_slice():
    delta = kronecker((noise(8, 8),), (noise(12, 24),), (0, 0, 96), (N, K))
    x, y = noise(2, 96, K), noise(2, 96, N)
    assert close(delta.add_to(y, x, 0.5), y + 0.5 * x @ delta.dense(N, K).T)


@pytest.mark.parametrize("axis", ["rows", "cols"])
def test_dora_is_the_formula(axis):
    weight, delta = noise(N, K), 0.1 * noise(N, K, seed=1)
    magnitude = 1 + 0.1 * (noise(N, 1) if axis == "rows" else noise(1, K))
    found = dora(magnitude, weight, delta, None)
    norm = weight.norm(dim=1, keepdim=True) if axis == "rows" else (weight + delta).norm(dim=0, keepdim=True)
    assert close(getattr(found, axis), (magnitude / norm).flatten())


def test_dora_on_a_slice_across_its_axis_is_refused():
    with pytest.raises(LoraError, match="no exact form"):
        dora(torch.ones(1, K), noise(N, K), noise(64, K), (0, 0, 64))
    with pytest.raises(LoraError, match="no exact form"):
        dora(torch.ones(N, 1), noise(N, K), None, (1, 0, 64))


def test_a_fit_finds_the_rank_and_states_what_it_keeps():
    low = noise(600, 20) @ noise(20, 500, seed=1)
    columns, kept = fit(low, LoraLimits())
    assert columns.rank == 32 and kept > 1 - 1e-6
    assert close(columns.dense(600, 500), low, 1e-3)
    full = noise(600, 500)
    columns, kept = fit(full, LoraLimits(max_rank=64, max_lost=1.0))
    assert columns.rank == 64
    lost = (columns.dense(600, 500) - full).square().sum() / full.square().sum()
    assert 1 - kept == pytest.approx(lost.item(), abs=1e-3)
    with pytest.raises(LoraError, match=r"nearest 64 columns keep \d+\.\d% of its energy; at least 98.0%"):
        fit(full, LoraLimits(max_rank=64))
    assert torch.equal(fit(full, LoraLimits(64, 1.0))[0].up, columns.up), "the same bits each time"


BAD_FACTORS = {
    "no tensor": (["up"], "a factor is of type list, needed a tensor"),
    "a convolution": (torch.ones(N, 4, 3, 3), "is of a convolution, the layer is linear"),
    "a vector": (torch.ones(N), "needed"),
    "of another height": (torch.ones(N + 1, 4), rf"\({N + 1}, 4\) and \(4, {K}\), needed \({N}, r\) and \(r, {K}\)"),
    "of another rank": (torch.ones(N, 5), "trained for another model"),
}


@pytest.mark.parametrize("name", BAD_FACTORS)
def test_factors_that_do_not_fit_are_refused(name):
    up, words = BAD_FACTORS[name]
    with pytest.raises(LoraError, match=words):
        columns_of([(up, torch.ones(4, K), None)], (N, K))
    for down in (torch.ones(4, K - 1), torch.ones(4, K + 1), torch.ones(4), torch.ones(())):
        with pytest.raises(LoraError, match="trained for another model"):
            columns_of([(torch.ones(N, 4), down, None)], (N, K))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.int8, torch.float32),
        (torch.int32, torch.float32),
    ],
)
def test_every_dtype_becomes_one_that_holds_its_numbers(given, kept):
    up, down = (8 * noise(N, 4)).to(given)[..., None, None], (8 * noise(4, K, seed=1)).to(given)
    delta = columns_of([(up, down, None)], (N, K))
    assert delta.up.dtype == delta.down.dtype == kept
    assert torch.equal(delta.up[:, :4].double(), up.flatten(1).double())
    mixed = columns_of([(up, down.float(), None)], (N, K))
    assert mixed.up.dtype == torch.float32 and torch.equal(mixed.up[:, :4].double(), up.flatten(1).double())


@pytest.mark.parametrize("offset", [(2, 0, 4), (-1, 0, 4), (0, -1, 4), (1, 0, 0), (0, N - 3, 4), (1, K, 1)])
def test_parts_that_no_weight_has_are_refused(offset):
    with pytest.raises(LoraError, match=r"for the part \(.*of a weight of shape \(128, 192\)"):
        span(offset, (N, K))


def test_parts_are_rows_or_columns_up_to_the_last():
    assert span(None, (N, K)) == ((0, N), (0, K))
    assert span((0, N - 1, 1), (N, K)) == ((N - 1, 1), (0, K)) and span((1, 2, K - 2), (N, K)) == ((0, N), (2, K - 2))


@pytest.mark.parametrize("offset", [None, (0, 32, 96), (1, 96, 96)])
def test_deltas_bend_by_rows_and_columns_one_after_another(offset):
    n, k = (N, K) if offset is None else (96, K) if offset[0] == 0 else (N, 96)
    rows, cols = (1 + 0.5 * noise(2, size, seed=size).abs() for size in (N, K))
    columns = columns_of([(noise(n, 4), noise(4, k, seed=1), offset)], (N, K))
    kron = kronecker((noise(8, 8),), (noise(n // 8, k // 8),), offset, (N, K))
    x, y = noise(3, K), noise(3, N)
    for delta in (columns, kron):
        bent = delta.scaled(rows[0], None).scaled(None, cols[0]).scaled(rows[1], cols[1])
        wanted = (rows[0] * rows[1])[:, None] * delta.dense(N, K) * (cols[0] * cols[1])
        assert close(bent.dense(N, K), wanted)
        assert bent.scaled(None, None).rank == delta.rank
        if isinstance(delta, Kron):
            assert close(bent.add_to(y, x, 0.3), y + 0.3 * x @ wanted.T)
    assert columns.rank == 16 and columns.numel == 16 * (N + K)
    assert kron.rank == 0 and kron.numel == 64 + n * k // 64
    assert kron.scaled(rows[0], cols[0]).numel == kron.numel + n + k
    low = Kron(kron.left, (noise(n // 8, 2), noise(2, k // 8)), kron.rows, kron.cols)
    exact = Kron(kron.left, (low.right[0] @ low.right[1],), kron.rows, kron.cols)
    assert close(low.dense(N, K), exact.dense(N, K)) and close(low.add_to(y, x, 1.0) - y, exact.add_to(y, x, 1.0) - y)
    moved = kron.scaled(rows[0], None).to(torch.device("cpu"), torch.float64)
    assert {tensor.dtype for tensor in moved.tensors} == {torch.float64}
    assert len(moved.tensors) == 3 and moved.rows == kron.rows and moved.cols == kron.cols


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("offset", [None, (0, 32, 96), (1, 96, 96)])
def test_no_number_of_a_block_is_left_as_memory_had_it(rank, offset, monkeypatch):
    n, k = (N, K) if offset is None else (96, K) if offset[0] == 0 else (N, 96)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN
    try:
        delta = columns_of([(noise(n, rank), noise(rank, k), offset)], (N, K))
    finally:
        torch.use_deterministic_algorithms(False)
    assert delta.rank == 16 and delta.up.isfinite().all() and delta.down.isfinite().all()
    wanted = torch.zeros(N, K)
    part = wanted if offset is None else wanted.narrow(*offset)
    part.copy_(noise(n, rank) @ noise(rank, k))
    assert close(delta.dense(N, K), wanted)


@pytest.mark.parametrize("number", [1e6, -1e6])
def test_numbers_whose_products_would_overflow_are_refused(number):
    up, down = noise(N, 4), noise(4, K)
    for factor in (up, down):
        factor[2, 3] = number
        assert columns_of([(up, down, None)], (N, K)).up.abs().amax() <= 1e6
        factor[2, 3] = 1.01 * number
        with pytest.raises(LoraError, match=r"the LoRA holds 1\.01e\+06, at most 1e\+06 is used"):
            columns_of([(up, down, None)], (N, K))
        factor[2, 3] = 0


def test_what_is_in_place_is_copied_only_out_of_inference_mode():
    with torch.inference_mode():
        one = torch.ones(2)
        assert placed(one, torch.device("cpu"), torch.float32) is one
    other = placed(one, torch.device("cpu"), torch.float32)
    assert not other.is_inference() and torch.equal(other, torch.ones(2))
    assert placed(other, torch.device("cpu"), torch.float32) is other


SHARED = (Columns, Kron, LoraFactors, LohaFactors, LokrFactors, DenseDelta, WeightFunction, Term, FactoredTerm)


@pytest.mark.parametrize("kind", SHARED)
def test_deltas_are_told_apart_as_objects_and_stay_as_they_are(kind):
    one, other = (kind(**dict.fromkeys(kind.__dataclass_fields__, torch.ones(2))) for _ in range(2))
    assert one != other and len({one, other}) == 2
    with pytest.raises(AttributeError):
        setattr(one, next(iter(kind.__dataclass_fields__)), None)
