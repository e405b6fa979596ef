"""GPTQ, Gram matrices and the low-rank refit against their definitions in float64."""

import pytest
import torch

from svdquant_pack.kernels import FORMATS, LayerSpec
from svdquant_pack.quantize.maths import lowrank
from svdquant_pack.quantize.maths.inputs import Gram, LayerInput, gather, round_activation
from svdquant_pack.quantize.maths.rounding import absmax_scales, factorize, gptq, searched_scales


def tokens(m: int, k: int, seed: int = 0) -> torch.Tensor:
    """Strongly correlated rows with a mean: what GPTQ lives from."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(k, k, generator=generator) * torch.logspace(0, -2, k)[:, None]
    return torch.randn(m, k, generator=generator) @ basis + torch.randn(k, generator=generator)


def gram(x: torch.Tensor, largest: int = 1 << 20) -> Gram:
    made = Gram.zeros(x.shape[1], largest, x.device)
    made.add(x)
    made.finish(len(x), torch.zeros(x.shape[1]))
    return made


def slow_gptq(target, hessian, scales, damping):
    """The definition, one column at a time: the inverse of what is left of H spreads each error over what follows."""
    target, h = target.double().clone(), hessian.double().clone()
    order = h.diagonal().argsort(descending=True, stable=True)
    h.diagonal().add_(damping * h.diagonal().mean())
    group, rounded, left = target.shape[1] // scales.step.shape[1], torch.zeros_like(target), order.tolist()
    while left:
        column = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        near = scales.nearest(target[:, column].float(), scales.step[:, column // group]).double()
        rounded[:, column] = near
        error = (target[:, column] - near) / inverse[0, 0]
        target[:, left[1:]] -= error[:, None] * inverse[0, 1:]
        left = left[1:]
    return rounded


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("k", [64, 192])  # inside one block of columns, and across two
def test_gptq_is_its_definition(format, k):
    weight = torch.randn(12, k, generator=torch.Generator().manual_seed(1))
    hessian = gram(tokens(400, k))
    scales = absmax_scales(weight, FORMATS[format], torch.bfloat16)
    fast = gptq(weight, factorize(hessian), scales)
    slow = slow_gptq(weight, hessian.blocks[0], scales, 0.01)
    # float32 against float64: an element at the edge of a rounding cell may fall to the other side
    assert (fast.double() != slow.float().double()).float().mean() < 0.02
    difference = (weight - fast).double(), weight.double() - slow
    errors = [(d @ hessian.blocks[0].double() * d).sum().item() for d in difference]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_gptq_beats_rounding_to_nearest_in_the_metric_it_minimizes():
    weight, hessian = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)), gram(tokens(1000, 256))
    scales = searched_scales(weight, FORMATS["int4"], torch.bfloat16)

    def error(rounded):
        return ((weight - rounded) @ hessian.blocks[0] * (weight - rounded)).sum()

    assert error(gptq(weight, factorize(hessian), scales)) < 0.5 * error(scales.round(weight))


def test_dead_and_constant_channels_do_no_harm():
    x = tokens(300, 128)
    x[:, 7], x[:, 20] = 0, x[:, 21]  # dead, and an exact copy: H is singular
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    scales = absmax_scales(weight, FORMATS["int4"], torch.bfloat16)
    rounded = gptq(weight, factorize(gram(x), damping=0.0), scales)
    assert rounded.isfinite().all() and torch.equal(rounded[:, 7], scales.round(weight)[:, 7])


def test_a_block_diagonal_hessian_is_gptq_of_each_block():
    x, weight = tokens(500, 256), torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    scales = absmax_scales(weight, FORMATS["int4"], torch.bfloat16)
    whole = gptq(weight, factorize(gram(x, 128)), scales)
    assert gram(x, 128).starts == (0, 128)
    for part in (slice(0, 128), slice(128, 256)):
        own = absmax_scales(weight[:, part], FORMATS["int4"], torch.bfloat16)
        assert torch.equal(whole[:, part], gptq(weight[:, part], factorize(gram(x[:, part])), own))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_moments_are_those_of_the_dense_input(format, centred):
    x, smooth = tokens(700, 128) * 3 + 50, torch.rand(128, generator=torch.Generator().manual_seed(2)) + 0.5
    spec = LayerSpec(format, 8, 128, 0, (64, 128) if format == "int4" else (0, 0))
    found = gather(LayerInput(x, smooth, spec), centred=centred)
    shifted = x.double()
    shifted[:, slice(*spec.act_unsigned)] += 0.171875
    z = shifted / smooth
    zq = round_activation(z.float(), spec).double()
    for mean, matrix, value in ((found.mean, found.raw, z), (found.mean_rounded, found.rounded, zq)):
        expected = value.mean(0) if centred else torch.zeros(128, dtype=torch.float64)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-5)
        dense = value.T @ value / len(value) - torch.outer(expected, expected)
        torch.testing.assert_close(matrix.blocks[0].double(), dense, rtol=1e-3, atol=1e-4 * dense.diagonal().max())


def test_the_refit_is_the_least_squares_fit_of_its_rank():
    """Without a rank limit it solves min ||X R.T - X L.T||; at rank r no other rank-r matrix may be better."""
    x, residual = tokens(600, 48).double(), torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    root = gram(x.float()).root(0)
    down, up = lowrank.refit(residual, root, 6, 0)
    fit = x @ (residual.double() - up.double() @ down.double().T).T
    # the definition, by a full SVD of the output: the best rank-6 output is reachable from X, so it bounds the fit
    output = x @ residual.double().T
    bound = torch.linalg.svdvals(output)[6:].square().sum().sqrt()
    assert fit.norm() == pytest.approx(bound.item(), rel=1e-3)
    down, up = lowrank.refit(residual, root, 32, 0)
    solution = torch.linalg.lstsq(x, output).solution.T
    torch.testing.assert_close((up @ down.T).double(), solution, rtol=1e-3, atol=1e-3)


def test_the_refit_of_a_block_diagonal_metric_is_that_of_the_matrix():
    x, residual = tokens(600, 256), torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    blocks = gram(x, 128)
    dense = torch.block_diag(*blocks.blocks)
    down, up = lowrank.refit(residual, blocks.root(1e-5), 8, 0)
    down2, up2 = lowrank.refit(residual, Gram((0,), (dense,)).root(1e-5), 8, 0)
    torch.testing.assert_close(up @ down.T, up2 @ down2.T, rtol=1e-2, atol=1e-2)


def test_exact_and_randomized_splits_agree():
    matrix = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    exact = lowrank.split_exactly(matrix, 8)
    fast = lowrank.split(matrix, 8, 0)
    errors = [(matrix - up @ down.T).norm() for down, up in (exact, fast)]
    assert errors[0] <= errors[1] * (1 + 1e-5) and errors[1] < 1.01 * errors[0]


@pytest.mark.parametrize("gain", [1e-6, 1.0, 1e6])
def test_a_balanced_branch_has_columns_of_equal_length_on_both_sides(gain):
    """fp16 ends at 65,504 and has few digits under 6e-5: neither factor may take the whole range of the product."""
    generator = torch.Generator().manual_seed(0)
    down, up = gain * torch.randn(48, 5, generator=generator), torch.randn(64, 5, generator=generator) / gain
    down[:, 3], up[:, 4] = 0, 0  # a column that does nothing stays finite
    lengths = [factor.norm(dim=0) for factor in lowrank.balance(down, up)]
    torch.testing.assert_close(lengths[0][:3], lengths[1][:3])
    new_down, new_up = lowrank.balance(down, up)
    torch.testing.assert_close(new_up @ new_down.T, up @ down.T)
    assert new_down.isfinite().all() and new_up.isfinite().all()
    assert new_down[:, :3].half().isfinite().all() and (new_down[:, :3].half() == 0).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(300, 260), (40, 260)])
def test_a_split_is_the_best_approximation_of_its_rank(shape):
    """By random probes for the large one, and no worse than they are known to be."""
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(2)) * torch.logspace(0, -2, shape[1])
    best = torch.linalg.svdvals(matrix)[12:].norm()
    for down, up in (lowrank.split(matrix, 12, 0), lowrank.split_exactly(matrix, 12)):
        assert down.shape == (shape[1], 12) and up.shape == (shape[0], 12)
        assert (matrix - up @ down.T).norm() < 1.01 * best
        torch.testing.assert_close(down.norm(dim=0), up.norm(dim=0), rtol=1e-4, atol=1e-4)
    wide = lowrank.split(matrix[:8], 16, 0)
    assert wide[0].shape == (shape[1], 16) and not wide[0][:, 8:].any()
    torch.testing.assert_close(wide[1] @ wide[0].T, matrix[:8], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 200), (200, 40)])
def test_where_probes_would_save_nothing_the_split_is_exact(shape):
    """Singular values that hardly fall are what random probes find worst."""
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(4))
    exact, found, probed = (
        (matrix - up @ down.T).norm().item()
        for down, up in (lowrank.split_exactly(matrix, 12), lowrank.split(matrix, 12, 0), _by_probes(matrix, 12))
    )
    assert found == pytest.approx(exact, rel=1e-6) and probed > (1 + 1e-5) * exact, "else nothing could be told apart"


@pytest.mark.parametrize(("rank", "by_probes"), [(13, True), (14, False)])
def test_probes_are_drawn_where_they_are_less_than_half_of_the_matrix(rank, by_probes):
    """Only then does the seed matter; 16 more of them are drawn than singular values are wanted."""
    matrix = torch.randn(60, 200, generator=torch.Generator().manual_seed(5))
    splits = [lowrank.split(matrix, rank, seed)[0] for seed in (0, 1)]
    assert torch.equal(*splits) is not by_probes
    width = rank + lowrank.OVERSAMPLING if by_probes else 60
    assert [part.shape for part in lowrank.leading(matrix, rank, 1, 0)] == [(60, width), (width,), (200, width)]
    assert (lowrank.tails(matrix, (1, rank), 0) == lowrank.tails(matrix, (1, rank), 1)) is not by_probes


def _by_probes(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, v = lowrank.randomized_svd(matrix, rank + lowrank.OVERSAMPLING, lowrank.POWER_STEPS, 0)
    return v[:, :rank], u[:, :rank] * s[:rank]
