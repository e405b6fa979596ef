"""More bits for the worst layers: 8-bit activations first, 16 bit where they do not help, within their limits."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.kernels import LayerSpec
from svdquant_pack.quantize.calibration.file import Statistics
from svdquant_pack.quantize.calibration.tokens import ModelCall
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.maker.decide import HEADER, Unit, eight_bits
from svdquant_pack.quantize.maker.model import EightShare, Target, quantize_model
from svdquant_pack.quantize.maker.report import as_markdown, summarize
from svdquant_pack.quantize.recipe import Recipe

SIZE, BLOCKS = 128, 10
LAYERS = [f"blocks.{block}.mlp" for block in range(BLOCKS)]
LOUD = "blocks.3.mlp"  # spikes in its activations, never in the same place: 8-bit activations help
ROUGH = "blocks.6.mlp"  # spikes in its weight as well: they do not help enough
SURPRISE = "blocks.8.mlp"  # spikes in the held-out tokens only, which no prediction sees
LIMIT = 0.12


def spikes(shape, generator, often, size) -> torch.Tensor:
    """Ones, and `size` in a share `often` of random places."""
    return torch.where(torch.rand(shape, generator=generator) < often, size, 1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(16-bit file, statistics) of ten equal layers but for the planted ones."""
    folder, generator = tmp_path_factory.mktemp("model"), torch.Generator().manual_seed(0)
    weights = {f"{layer}.weight": torch.randn(SIZE, SIZE, generator=generator) / 11 for layer in LAYERS}
    weights[f"{ROUGH}.weight"] *= spikes((SIZE, SIZE), generator, 0.04, 20.0)
    save_file({key: weight.bfloat16() for key, weight in weights.items()}, folder / "model.safetensors")
    made = Statistics.create(folder / "s.safetensors", dict.fromkeys(LAYERS, SIZE), 1024, {"shared": {}})
    for layer in LAYERS:
        entry = made.entries[layer]
        for step in range(8):
            x = torch.randn(1, 128, SIZE, generator=generator)
            if layer in (LOUD, ROUGH):
                x *= spikes(x.shape, generator, 0.02, 20.0)
            entry.observe(x, ModelCall(step, 8), generator)
        if layer == SURPRISE:
            held = entry.hold == 1
            entry.tokens[held] = (
                entry.tokens[held] * spikes((int(held.sum()), SIZE), generator, 0.02, 20.0)
            ).bfloat16()
    return folder / "model.safetensors", made


def run(model, path, **changes):
    settings = {"rank": 16, "adam_steps": 8, "rounds": 2, "start_rounds": 1, "fallback": LIMIT, "act8_share": 0.3}
    recipe = Recipe.named("balanced", **{**settings, **changes})
    return quantize_model(FileSource(model[0]), path, recipe, None, "cpu", model[1])


def test_the_worst_layers_get_8_bit_activations_and_then_16_bit(model, tmp_path):
    plain = run(model, tmp_path / "plain.safetensors", fallback=0.0)
    worst = {layer for layer, record in plain.layers.items() if record["output_error"] > LIMIT}
    assert worst == {LOUD, ROUGH, SURPRISE} and not plain.eight and not plain.kept
    report = run(model, tmp_path / "x.safetensors")
    assert set(report.eight) == {LOUD, SURPRISE} and set(report.kept) == {ROUGH}
    assert report.eight[LOUD].startswith("predicted error 0.2") and report.eight[LOUD].endswith(f"is above {LIMIT:g}")
    assert report.eight[SURPRISE].startswith("output error 0."), "what was not foreseen is found when it is measured"
    assert report.kept[ROUGH].endswith(f"is above {LIMIT:g}, with 8-bit activations too")
    for layer in (LOUD, SURPRISE):
        before, after = plain.layers[layer], report.layers[layer]
        assert after["output_error"] < 0.6 * before["output_error"] and after["act_bits"] == 8
        assert after["activation_part"] < 0.2 * before["activation_part"]
    for layer in set(LAYERS) - {LOUD, ROUGH, SURPRISE}:
        assert report.layers[layer]["output_error"] == plain.layers[layer]["output_error"]
    stored = open_checkpoint(tmp_path / "x.safetensors").specs
    assert {layer: spec.act_bits for layer, spec in stored.items()} == {
        layer: 8 if layer in report.eight else 4 for layer in LAYERS if layer != ROUGH
    }
    assert torch.equal(load_file(tmp_path / "x.safetensors")[f"{ROUGH}.weight"], load_file(model[0])[f"{ROUGH}.weight"])


def test_the_share_goes_to_where_it_gains_most(model, tmp_path):
    one = run(model, tmp_path / "one.safetensors", act8_share=0.1)
    assert len(one.eight) + sum("8-bit" in reason for reason in one.kept.values()) == 1
    assert set(one.eight) | set(one.kept) == {LOUD, ROUGH, SURPRISE}
    none = run(model, tmp_path / "none.safetensors", act8_share=0.0)
    assert not none.eight and set(none.kept) == {LOUD, ROUGH, SURPRISE}


def test_within_a_target_size_8_bit_activations_take_no_bytes_and_16_bit_only_what_is_left(model, tmp_path):
    least = run(model, tmp_path / "least.safetensors", fallback=0.0, rank=0).bytes_4bit + HEADER
    tight = run(model, tmp_path / "tight.safetensors", target_size=least + 10_000)
    assert {LOUD, ROUGH} <= set(tight.eight) and not tight.kept and tight.bytes_4bit <= least + 10_000
    roomy = run(model, tmp_path / "roomy.safetensors", target_size=least + 2 * SIZE * SIZE)
    assert LOUD in roomy.eight and ROUGH not in roomy.eight and set(roomy.kept) == {ROUGH}
    assert roomy.kept[ROUGH].endswith("with 8-bit activations too")
    assert roomy.bytes_4bit <= least


def test_a_stopped_run_remembers_what_it_chose(model, tmp_path):
    def stop(done, total, layer):
        if done == 9:
            raise KeyboardInterrupt

    recipe = Recipe.named("balanced", rank=16, adam_steps=8, rounds=2, start_rounds=1, fallback=LIMIT, act8_share=0.3)
    target = tmp_path / "target.safetensors"
    with pytest.raises(KeyboardInterrupt):
        quantize_model(FileSource(model[0]), Target(target, resume=True), recipe, stop, "cpu", model[1])
    report = quantize_model(FileSource(model[0]), Target(target, resume=True), recipe, None, "cpu", model[1])
    whole = run(model, tmp_path / "whole.safetensors")
    assert report.resumed == 9 and (report.eight, report.kept) == (whole.eight, whole.kept)
    assert target.read_bytes() == whole.path.read_bytes()


def test_the_report_says_what_was_chosen_and_why(model, tmp_path):
    report = run(model, tmp_path / "x.safetensors")
    text = as_markdown(summarize(report), [])
    assert "- 8-bit activations: 2 layers, 20.0% of the multiply-adds\n" in text
    assert f"- {LOUD} has 8-bit activations: {report.eight[LOUD]}\n" in text
    assert f"- {ROUGH} stays in 16 bit: {report.kept[ROUGH]}\n" in text
    assert f"| {LOUD} | 128x128 | 16 | 8 |" in text


def unit(n, error, error8, sensitivity=1.0) -> Unit:
    return Unit(LayerSpec("int4", n, 64), (error,) * 9, sensitivity, None if error8 is None else (error8,) * 9)


def test_gain_per_multiply_add_decides_and_groups_stay_together():
    units = {
        "a": unit(64, 0.09, 0.01),
        "b": unit(64, 0.01, 0.002),
        "wide": unit(640, 0.16, 0.01),
        "unknown": unit(64, 1, None),
    }
    groups = [("a", "b"), ("wide",), ("unknown",)]
    # a and b together: 0.088 for 128 rows; wide: 0.15 for 640
    assert list(eight_bits(units, groups, 0.2, 1.0, 32)) == ["a", "b", "wide"]
    chosen = eight_bits(units, groups, 0.2, 0.2, 32)
    assert chosen == {"a": "predicted error 0.300 at rank 32 is above 0.2", "b": "reads the activation of a"}
    assert not eight_bits(units, groups, 0.2, 0.1, 32)


def test_a_sensitive_layer_is_one_of_the_worst_though_its_error_is_small():
    units = {name: unit(64, 0.01, 0.004) for name in "abcd"} | {"e": unit(64, 0.01, 0.004, sensitivity=6)}
    groups = [(name,) for name in units]
    assert eight_bits(units, groups, 0.5, 1.0, 32) == {
        "e": "predicted to cost the model 6.0 times what the median layer costs it"
    }


def test_the_share_falls_where_8_bit_layers_stay_in_16_bit_and_grows_where_others_join():
    share = EightShare({"a": 40, "b": 30, "c": 30}, 0.5, frozenset("a"))
    assert share.of("ab") == 0.7 and not share.has_room_for("b") and share.of("x") == 0
    assert not share.after({"b": {}, "c": {}}).has_room_for("b")
    freed = share.after({"a": {"kept": "output error 0.5 is above 0.1, with 8-bit activations too"}})
    assert freed.has_room_for("b") and not freed.after({"c": {"eight": "output error"}}).has_room_for("b")
    assert share.eight == frozenset("a") and not EightShare({}, 0.5, frozenset()).of("a")
