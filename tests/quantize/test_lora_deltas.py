"""LoRA deltas against the dense matrices that they stand for; no host needed."""

import pytest
import torch

from svdquant_pack.quantize.lora.deltas import Columns, Kron, LoraError, columns_of
from svdquant_pack.quantize.lora.fit import LOHA_COLUMNS, LoraLimits, dora, fit, hadamard, kronecker

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
