"""LoRAs on a 4-bit layer, loaded and baked, against the dense layer; no host needed."""

from dataclasses import replace

import pytest
import torch

from svdquant_pack.kernels import Prepared
from svdquant_pack.kernels.layer import Layer, LayerSpec
from svdquant_pack.quantize.calibration.file import Statistics
from svdquant_pack.quantize.calibration.tokens import ModelCall
from svdquant_pack.quantize.linear import PackedLinear
from svdquant_pack.quantize.lora.bake import bake_layer
from svdquant_pack.quantize.lora.deltas import columns_of
from svdquant_pack.quantize.lora.fit import LoraLimits, kronecker
from svdquant_pack.quantize.lora.loras import LayerLoras
from svdquant_pack.quantize.maker.model import quantize_layer
from svdquant_pack.quantize.maths.layer import Dense, Making
from svdquant_pack.quantize.recipe import Recipe

N, K = 128, 192
EXACT = 1e-5  # float32 sums in another order


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float = EXACT) -> bool:
    return ((found - wanted).norm() / wanted.norm()).item() < bound


@pytest.fixture(scope="module", params=["int4", "int4 unsigned", "nvfp4"])
def layer(request) -> tuple[Layer, torch.Tensor]:
    fmt, *unsigned = request.param.split()
    spec = LayerSpec(fmt, N, K, 16, (64, 192) if unsigned else (0, 0))
    dense = Dense(noise(N, K) / K**0.5, 0.1 * noise(N), spec)
    made = quantize_layer(dense, Making(Recipe(format=fmt, rank=16), torch.bfloat16))
    return made.layer, made.bias


@pytest.mark.parametrize("bent", ["", "rows", "cols", "rows cols"])
def test_loaded_loras_are_the_dense_layer(layer, bent):
    layer, bias = layer
    blob, packed = PackedLinear.pack(layer, "w16")
    pure = layer.unshifted_bias(bias).float()
    deltas = (
        columns_of([(0.05 * noise(N, 4), noise(4, K), None)], (N, K)),
        kronecker((0.05 * noise(8, 8),), (noise(16, 24),), None, (N, K)),
        columns_of([(0.05 * noise(N, 16, seed=5), noise(16, K), None)], (N, K)),
    )
    factors = {name: 1 + 0.1 * noise(N if name == "rows" else K) for name in bent.split()}
    shift = pure - bias.float() if layer.spec.act_unsigned != (0, 0) and "rows" in factors else None
    loras = LayerLoras(deltas, (0.5, -0.8, 1.5), shift=shift, **factors)
    x = noise(9, K)
    wanted = x @ loras.dense_weight(layer.dense_weight()).T + pure
    loaded = loras.on(x.device, x.dtype)
    assert close(loaded.forward(packed, x, blob, bias.float()), wanted)
    other = LayerLoras(deltas, (1.0, 1.0, 1.0), shift=shift, **factors)
    assert loaded.fits(other) and not loaded.fits(LayerLoras(deltas[:2], (1.0, 1.0)))
    loaded.follow(other)
    wanted = x @ other.dense_weight(layer.dense_weight()).T + pure
    assert close(loaded.forward(packed, x, blob, bias.float()), wanted)


def test_a_strength_is_a_vector_beside_factors_that_stay_where_they_are(layer, monkeypatch):
    seen = []
    original = Prepared.__call__

    def record(self, x, layer, bias, lora):
        seen.append(lora)
        return original(self, x, layer, bias, lora)

    monkeypatch.setattr(Prepared, "__call__", record)
    layer, bias = layer
    blob, packed = PackedLinear.pack(layer, "w16")
    deltas = tuple(columns_of([(0.05 * noise(N, r, seed=r), noise(r, K), None)], (N, K)) for r in (4, 20))
    x, outputs = noise(9, K), []
    loaded = LayerLoras(deltas, (1.0, 1.0)).on(x.device, x.dtype)
    factors = loaded.down, loaded.up
    for scales, vector in (
        ((1.0, 1.0), [1.0] * 3),
        ((0.0, 0.0), [0.0] * 3),
        ((0.7, 0.7), [0.7] * 3),
        ((1.0, -2.5), [1.0, -2.5, -2.5]),
    ) * 2:
        loras = LayerLoras(deltas, scales)
        loaded.follow(loras)
        outputs.append(loaded.forward(packed, x, blob, bias.float()))
        down, up, strength = seen[-1]
        assert down is factors[0] and up is factors[1]
        assert torch.equal(strength, torch.tensor(vector)), "one tensor at every strength, 1 and 0 included"
        wanted = x @ loras.dense_weight(layer.dense_weight()).T + layer.unshifted_bias(bias).float()
        assert close(outputs[-1], wanted)
    assert all(torch.equal(first, again) for first, again in zip(outputs[:4], outputs[4:], strict=True))


@pytest.mark.parametrize("rank", [None, 16, 32])
def test_a_baked_layer_keeps_its_4bit_weight(layer, rank):
    layer, _ = layer
    loras = LayerLoras((columns_of([(0.02 * noise(N, 32), noise(32, K), None)], (N, K)),), (0.5,))
    baked = bake_layer(layer, loras, rank, LoraLimits())
    assert baked.layer.spec.rank == (48 if rank is None else rank)
    assert all(baked.layer[name] is layer[name] for name in layer.tensors if not name.startswith("proj_"))
    wanted = loras.dense_weight(layer.dense_weight())
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
    loras = LayerLoras((columns_of([(0.02 * noise(N, 32), noise(32, K), None)], (N, K)),), (0.5,))
    x = noise(900, 12, seed=2) @ noise(12, K, seed=3) + 0.05 * noise(900, K, seed=4)
    statistics = Statistics.create(tmp_path / "s.safetensors", {"layer": K}, 512, {})
    entry = statistics.entry("layer")
    entry.observe(x, ModelCall(0, 1), torch.Generator().manual_seed(0))
    by_scale, by_tokens = (bake_layer(layer, loras, 16, LoraLimits(), entry=known) for known in (None, entry))
    assert by_tokens.layer.spec == by_scale.layer.spec
    wanted, plain = x @ loras.dense_weight(layer.dense_weight()).T, x @ layer.dense_weight().T

    def lost(baked) -> float:
        return ((x @ baked.layer.dense_weight().T - wanted).norm() / (plain - wanted).norm()).square().item()

    assert lost(by_tokens) < 0.2 * lost(by_scale)
    assert by_tokens.lost == pytest.approx(lost(by_tokens), rel=0.5), "what is reported is what is lost"


def test_a_baked_layer_keeps_its_rules(layer):
    layer, _ = layer
    rule = layer.spec.fmt.act_rules[-1]
    other = Layer(replace(layer.spec, act_rule=rule), layer.tensors)
    loras = LayerLoras((columns_of([(noise(N, 4), noise(4, K), None)], (N, K)),), (0.5,))
    assert bake_layer(other, loras, None, LoraLimits()).layer.spec == replace(other.spec, rank=32)


def test_a_wider_refit_loses_less(layer):
    layer, _ = layer
    loras = LayerLoras((columns_of([(0.02 * noise(N, 32), noise(32, K), None)], (N, K)),), (0.5,))
    lost = [bake_layer(layer, loras, rank, LoraLimits()).lost for rank in (16, 32)]
    assert lost[1] < lost[0]
