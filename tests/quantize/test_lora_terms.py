"""LoRA parts against the dense matrices that they stand for; no host needed."""

from dataclasses import replace

import pytest
import torch

from svdquant_pack.kernels.layer import Layer, LayerSpec
from svdquant_pack.quantize import linear
from svdquant_pack.quantize.calibration.file import Statistics
from svdquant_pack.quantize.calibration.tokens import ModelCall
from svdquant_pack.quantize.linear import PackedLinear
from svdquant_pack.quantize.lora.bake import bake_layer
from svdquant_pack.quantize.lora.branch import Branch
from svdquant_pack.quantize.lora.fit import LOHA_COLUMNS, LoraLimits, dora, fit, hadamard, kronecker
from svdquant_pack.quantize.lora.terms import Columns, Kron, LoraError, columns_of
from svdquant_pack.quantize.maker.model import quantize_layer
from svdquant_pack.quantize.maths.layer import Dense, Making
from svdquant_pack.quantize.recipe import Recipe

N, K = 128, 192
EXACT = 1e-5  # float32 sums in another order


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float = EXACT) -> bool:
    return ((found - wanted).norm() / wanted.norm()).item() < bound


def test_columns_are_the_files_own_numbers_in_blocks_of_16():
    up, down = noise(N, 5).bfloat16(), noise(5, K, seed=1).bfloat16()
    part = columns_of([(up, down, None)], (N, K))
    assert part.rank == 16 and part.up.dtype == torch.bfloat16
    assert torch.equal(part.up[:, :5], up) and torch.equal(part.down[:, :5], down.T)
    assert not part.up[:, 5:].any() and not part.down[:, 5:].any()


@pytest.mark.parametrize("dim", [0, 1])
def test_slices_share_a_block(dim):
    size = (N, K)[dim]
    factors, wanted = [], torch.zeros(N, K)
    for index, (start, length) in enumerate(((0, size // 4), (size // 2, size // 2))):
        n, k = (length, K) if dim == 0 else (N, length)
        up, down = noise(n, 4, seed=index), noise(4, k, seed=9 + index)
        factors.append((up, down, (dim, start, length)))
        wanted.narrow(dim, start, length).add_(up @ down)
    part = columns_of(factors, (N, K))
    assert part.rank == 16
    assert close(part.dense(N, K), wanted)


def test_a_part_does_not_keep_the_file_in_memory():
    up, down = noise(N, 16), noise(16, K)
    part = columns_of([(up, down, None)], (N, K))
    assert part.up.data_ptr() != up.data_ptr() and part.down.data_ptr() != down.data_ptr()


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
    found = hadamard((a1, b1), (a2, b2), None, (N, K), LoraLimits())
    assert found.kept > 1 - 1e-6
    exact = ranks[0] * ranks[1] <= LOHA_COLUMNS
    assert close(found.part.dense(N, K), (a1 @ b1) * (a2 @ b2), EXACT if exact else 1e-3)


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
    part = kronecker(left, right, None, (N, K))
    assert isinstance(part, form)
    wanted = torch.kron(
        torch.linalg.multi_dot(left) if len(left) > 1 else left[0], right[0] @ right[1] if len(right) > 1 else right[0]
    )
    assert close(part.dense(N, K), wanted)
    if form is Kron:
        x, y = noise(3, 5, K), noise(3, 5, N)
        assert close(part.add_to(y, x, -0.7), y - 0.7 * x @ wanted.T)
        rows, cols = noise(N), noise(K)
        bent = part.scaled(rows, None).scaled(None, cols)
        assert close(bent.add_to(y, x, 1.0), y + x @ (rows[:, None] * wanted * cols).T)
        assert close(bent.dense(N, K), rows[:, None] * wanted * cols)


@pytest.mark.parametrize("offset", [(0, 32, 96), (1, 96, 96)])
def test_a_kronecker_product_on_a_slice(offset):
    n, k = (96, K) if offset[0] == 0 else (N, 96)
    part = kronecker((noise(8, 8),), (noise(n // 8, k // 8),), offset, (N, K))
    x, y = noise(7, K), noise(7, N)
    assert close(part.add_to(y, x, 2.0), y + 2 * x @ part.dense(N, K).T)
    assert torch.equal(part.dense(N, K).narrow(*offset), torch.kron(noise(8, 8), noise(n // 8, k // 8)))


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
    found = fit(low, LoraLimits())
    assert found.part.rank == 32 and found.kept > 1 - 1e-6
    assert close(found.part.dense(600, 500), low, 1e-3)
    full = noise(600, 500)
    found = fit(full, LoraLimits(max_rank=64, max_lost=1.0))
    assert found.part.rank == 64
    lost = (found.part.dense(600, 500) - full).square().sum() / full.square().sum()
    assert 1 - found.kept == pytest.approx(lost.item(), abs=1e-3)
    with pytest.raises(LoraError, match=r"nearest 64 columns keep \d+\.\d% of its energy; at least 98.0%"):
        fit(full, LoraLimits(max_rank=64))
    assert torch.equal(fit(full, LoraLimits(64, 1.0)).part.up, found.part.up), "the same bits each time"


@pytest.fixture(scope="module", params=["int4", "int4 unsigned", "nvfp4"])
def layer(request) -> tuple[Layer, torch.Tensor]:
    fmt, *unsigned = request.param.split()
    spec = LayerSpec(fmt, N, K, 16, (64, 192) if unsigned else (0, 0))
    dense = Dense(noise(N, K) / K**0.5, 0.1 * noise(N), spec)
    made = quantize_layer(dense, Making(Recipe(format=fmt, rank=16), torch.bfloat16))
    return made.layer, made.bias


@pytest.mark.parametrize("bent", ["", "rows", "cols", "rows cols"])
def test_a_loaded_branch_is_the_dense_layer(layer, bent):
    layer, bias = layer
    blob, packed = PackedLinear.pack(layer, "w16")
    pure = layer.unshifted_bias(bias).float()
    parts = (
        columns_of([(0.05 * noise(N, 4), noise(4, K), None)], (N, K)),
        kronecker((0.05 * noise(8, 8),), (noise(16, 24),), None, (N, K)),
        columns_of([(0.05 * noise(N, 16, seed=5), noise(16, K), None)], (N, K)),
    )
    factors = {name: 1 + 0.1 * noise(N if name == "rows" else K) for name in bent.split()}
    shift = pure - bias.float() if layer.spec.act_unsigned != (0, 0) and "rows" in factors else None
    branch = Branch(parts, (0.5, -0.8, 1.5), shift=shift, **factors)
    x = noise(9, K)
    wanted = x @ branch.dense_weight(layer.dense_weight()).T + pure
    loaded = branch.on(x.device, x.dtype)
    assert close(loaded.forward(packed, x, blob, bias.float()), wanted)
    other = Branch(parts, (1.0, 1.0, 1.0), shift=shift, **factors)
    assert loaded.fits(other) and not loaded.fits(Branch(parts[:2], (1.0, 1.0)))
    loaded.follow(other)
    wanted = x @ other.dense_weight(layer.dense_weight()).T + pure
    assert close(loaded.forward(packed, x, blob, bias.float()), wanted)


def test_a_strength_is_a_vector_beside_factors_that_stay_where_they_are(layer, monkeypatch):
    seen = []
    original = linear.svdquant_linear

    def record(*args, lora_strength):
        seen.append((args[3], lora_strength))
        return original(*args, lora_strength=lora_strength)

    monkeypatch.setattr(linear, "svdquant_linear", record)
    layer, bias = layer
    blob, packed = PackedLinear.pack(layer, "w16")
    parts = tuple(columns_of([(0.05 * noise(N, r, seed=r), noise(r, K), None)], (N, K)) for r in (4, 20))
    x, outputs = noise(9, K), []
    loaded = Branch(parts, (1.0, 1.0)).on(x.device, x.dtype)
    factors = loaded.down, loaded.up
    for scales, vector in (((1.0, 1.0), None), ((0.7, 0.7), [0.7] * 3), ((1.0, -2.5), [1.0, -2.5, -2.5])) * 2:
        branch = Branch(parts, scales)
        loaded.follow(branch)
        outputs.append(loaded.forward(packed, x, blob, bias.float()))
        lora, strength = seen[-1]
        assert lora[0] is factors[0] and lora[1] is factors[1]
        assert strength is None if vector is None else torch.equal(strength, torch.tensor(vector))
        wanted = x @ branch.dense_weight(layer.dense_weight()).T + layer.unshifted_bias(bias).float()
        assert close(outputs[-1], wanted)
    assert all(torch.equal(first, again) for first, again in zip(outputs[:3], outputs[3:], strict=True))


@pytest.mark.parametrize("rank", [None, 16, 32])
def test_a_baked_layer_keeps_its_4bit_weight(layer, rank):
    layer, _ = layer
    branch = Branch((columns_of([(0.02 * noise(N, 32), noise(32, K), None)], (N, K)),), (0.5,))
    baked = bake_layer(layer, branch, rank, LoraLimits())
    assert baked.layer.spec.rank == (48 if rank is None else rank)
    assert all(baked.layer[name] is layer[name] for name in layer.tensors if not name.startswith("proj_"))
    wanted = branch.dense_weight(layer.dense_weight())
    plain = (layer.dense_weight() - wanted).norm()
    missed = (baked.layer.dense_weight() - wanted).norm() / plain
    if rank is None:
        assert baked.lost == 0
        assert missed < 0.01  # the factors are rounded to bfloat16
    else:
        assert 0 < baked.lost < 1
        assert missed < 1


def test_a_refit_by_statistics_is_the_best_one_on_the_activations(layer, tmp_path):
    """Activations of low rank, in directions that no scale of single channels describes."""
    layer, _ = layer
    branch = Branch((columns_of([(0.02 * noise(N, 32), noise(32, K), None)], (N, K)),), (0.5,))
    x = noise(900, 12, seed=2) @ noise(12, K, seed=3) + 0.05 * noise(900, K, seed=4)
    statistics = Statistics.create(tmp_path / "s.safetensors", {"layer": K}, 512, {})
    entry = statistics.entry("layer")
    entry.observe(x, ModelCall(0, 1), torch.Generator().manual_seed(0))
    by_scale, by_tokens = (bake_layer(layer, branch, 16, LoraLimits(), entry=known) for known in (None, entry))
    assert by_tokens.layer.spec == by_scale.layer.spec
    wanted, plain = x @ branch.dense_weight(layer.dense_weight()).T, x @ layer.dense_weight().T

    def lost(baked) -> float:
        return ((x @ baked.layer.dense_weight().T - wanted).norm() / (plain - wanted).norm()).square().item()

    assert lost(by_tokens) < 0.2 * lost(by_scale)
    assert by_tokens.lost == pytest.approx(lost(by_tokens), rel=0.5), "what is reported is what is lost"


def test_a_baked_layer_keeps_its_rules(layer):
    layer, _ = layer
    rule = layer.spec.fmt.act_rules[-1]
    other = Layer(replace(layer.spec, act_rule=rule), layer.tensors)
    branch = Branch((columns_of([(noise(N, 4), noise(4, K), None)], (N, K)),), (0.5,))
    assert bake_layer(other, branch, None, LoraLimits()).layer.spec == replace(other.spec, rank=32)


def test_a_wider_refit_loses_less(layer):
    layer, _ = layer
    branch = Branch((columns_of([(0.02 * noise(N, 32), noise(32, K), None)], (N, K)),), (0.5,))
    lost = [bake_layer(layer, branch, rank, LoraLimits()).lost for rank in (16, 32)]
    assert lost[1] < lost[0]
