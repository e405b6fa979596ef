"""Converting keeps every number that both dialects can hold, says what it could not keep, and is whole or nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from svdquant_pack.kernels import FORMATS, svdquant_linear
from svdquant_pack.quantize.files.checkpoint import Checkpoint, CheckpointError, Provenance
from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.dialects import native
from svdquant_pack.quantize.files.integrity import KEY
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.tests.kernels.layers import random_layer
from svdquant_pack.tests.quantize.stored_models import QUANTIZED, save_model, stored_model
from svdquant_pack.tests.quantize.test_layout import same_bytes

ROOT = Path(__file__).resolve().parents[2]
INT4_ONLY = "comfy-kitchen has no nvfp4"


def same_checkpoint(a: Checkpoint, b: Checkpoint, but: tuple[str, ...] = ()) -> bool:
    """Whether all layers but `but` are the same; the zeros of modulation layers may have another dtype."""
    names = a.specs.keys() - but

    def same_layer(name: str) -> bool:
        ours, theirs = a.layer(name).tensors, b.layer(name).tensors
        zeros = "wzeros" not in ours or torch.equal(ours["wzeros"].float(), theirs["wzeros"].float())
        return zeros and all(same_bytes(ours[part], theirs[part]) for part in ours.keys() - {"wzeros"})

    return (
        names == b.specs.keys() - but
        and a.rest.keys() == b.rest.keys()
        and all(a.specs[name] == b.specs[name] for name in names)
        and all(map(same_layer, names))
        and all(same_bytes(a.tensor(name), b.tensor(name)) for name in a.rest if name.rpartition(".")[0] not in but)
    )


@pytest.mark.parametrize("to", ["native", "kitchen", "nunchaku"])  # test_core.py has the one that only writes
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("family", QUANTIZED)
def test_there_and_back(tmp_path, family, precision, to):
    source = save_model(tmp_path / "source.safetensors", stored_model(family, precision))
    middle, back = tmp_path / "middle.safetensors", tmp_path / "back.safetensors"
    if to == "kitchen" and precision == "nvfp4":
        with pytest.raises(CheckpointError, match=INT4_ONLY):
            convert_file(source, middle, to)
        assert not middle.exists()
        return
    report = convert_file(source, middle, to)
    assert (report.family, report.dialect) == (family, to)
    converted, original = open_checkpoint(middle), open_checkpoint(source)
    assert converted.dialect == to and converted.provenance.family == family
    changed = tuple(note.partition(":")[0] for note in report.notes)
    assert same_checkpoint(converted, original, changed)
    partly = to == "kitchen" and family in ("flux", "chroma")
    assert changed == (("single_blocks.0.linear2",) if partly else ())
    convert_file(middle, back, "nunchaku")
    before, after = load_file(source), load_file(back)
    assert before.keys() == after.keys()
    different = {key for key, tensor in before.items() if not same_bytes(tensor, after[key])}
    assert different <= ({"single_transformer_blocks.0.mlp_fc2.bias"} if changed else set())
    for key in different:  # the shift was added and taken off again in fp32, which moves numbers near zero
        assert torch.allclose(before[key].float(), after[key].float(), rtol=1e-2, atol=1e-5)


def test_a_quantized_model_survives_nunchaku_names(tmp_path):
    """A native FLUX model has one unstructured branch per linear1 and linear2; both parts then carry all of it."""
    path = save_model(tmp_path / "nunchaku.safetensors", stored_model("flux"))
    skeleton = open_checkpoint(path)
    layers = {
        name: random_layer(spec.format, spec.n, spec.k, 32 * spec.fmt.low_rank, spec.act_unsigned, torch.bfloat16)
        for name, spec in skeleton.specs.items()
    }
    tensors = {
        key: tensor for name, layer in layers.items() for key, tensor in native.encode_layer(name, layer).items()
    }
    tensors |= {name: skeleton.tensor(name) for name in skeleton.rest}
    source = save_model(tmp_path / "native.safetensors", tensors, native.metadata_of(Provenance("flux"), {}))
    convert_file(source, tmp_path / "out.safetensors", "nunchaku")
    back = open_checkpoint(tmp_path / "out.safetensors")
    for name, layer in layers.items():
        assert back.specs[name].act_unsigned == layer.spec.act_unsigned
        tolerance = 2e-2 if layer.spec.format == "awq_w4a16" else 1e-6  # zeros have 16 bits there
        assert torch.allclose(back.layer(name).dense_weight(), layer.dense_weight(), rtol=1e-6, atol=tolerance)


def test_signed_layers_become_unsigned_where_nunchaku_runs_them_so(tmp_path):
    source = save_model(tmp_path / "lite.safetensors", stored_model("qwen_image", lite=True))
    report = convert_file(source, tmp_path / "out.safetensors", "nunchaku")
    name = "transformer_blocks.0.img_mlp.net.2"
    assert any(note.startswith(f"{name}: activations became unsigned") for note in report.notes)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out.safetensors")
    assert (before.specs[name].act_unsigned, after.specs[name].act_unsigned) == ((0, 0), (0, 256))
    x = torch.nn.functional.gelu(torch.randn(4, 256, dtype=torch.float64))
    y = [svdquant_linear(x, c.layer(name), c.tensor(f"{name}.bias"), compute="w16") for c in (before, after)]
    assert torch.allclose(*y, atol=0.05)  # the new bias was rounded to 16 bit


def test_kitchen_runs_a_ranged_layer_signed_with_the_same_result(tmp_path):
    source = save_model(tmp_path / "flux.safetensors", stored_model("flux"))
    convert_file(source, tmp_path / "out.safetensors", "kitchen")
    name = "single_blocks.0.linear2"
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out.safetensors")
    x = torch.randn(4, 384, dtype=torch.float64)
    y = [svdquant_linear(x, c.layer(name), c.tensor(f"{name}.bias"), compute="w16") for c in (before, after)]
    assert torch.allclose(*y, atol=1e-5)


@pytest.mark.parametrize("to", ["nunchaku", "kitchen"])
def test_what_only_the_native_dialect_knows_is_left_with_a_note(tmp_path, to):
    """Means and 8-bit activations; the layer is the same one without them."""
    layer = random_layer("int4", 128, 128, 16, dtype=torch.bfloat16, centred=True, act_bits=8)
    source = save_model(tmp_path / "a.safetensors", native.encode_layer("blocks.0.proj", layer))
    report = convert_file(source, tmp_path / "b.safetensors", to, as_is=True)
    assert [note.partition(": ")[2][:14] for note in report.notes] == ["its act_mean i", "8-bit activati"]
    (read,) = (open_checkpoint(tmp_path / "b.safetensors", as_is=True).layer(name) for name in ["blocks.0.proj"])
    assert read.spec.act_bits == 4 and set(layer.tensors) - set(read.tensors) == {"act_mean", "out_mean"}
    assert torch.equal(read.dense_weight(), layer.dense_weight())


def test_the_header_travels_along(tmp_path):
    metadata = {"config": json.dumps({"_class_name": "FluxTransformer2DModel", "x": 1}), "author": "me"}
    source = save_model(tmp_path / "a.safetensors", stored_model("flux"), metadata)
    convert_file(source, tmp_path / "b.safetensors", "native")
    convert_file(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "nunchaku")
    kept = open_checkpoint(tmp_path / "c.safetensors").metadata
    assert kept["author"] == "me"
    config = json.loads(kept["config"])  # what is said is kept, the rest is found from the tensors
    assert config["x"] == 1 and (config["in_channels"], config["guidance_embeds"]) == (128, False)
    assert json.loads(kept["quantization_config"])["rank"] == 16


def test_a_file_of_a_newer_comfyui_is_the_same_model(tmp_path):
    source = save_model(tmp_path / "a.safetensors", stored_model("flux"))
    convert_file(source, tmp_path / "b.safetensors", "native")
    older = load_file(tmp_path / "b.safetensors")
    newer = {f"{key.removesuffix('.scale')}.weight" if key.endswith("_norm.scale") else key for key in older}
    assert len(newer - older.keys()) == 6
    tensors = {key: older.get(key, older.get(f"{key.removesuffix('.weight')}.scale")) for key in newer}
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if key != KEY}  # its host wrote others
    save_model(tmp_path / "c.safetensors", tensors, metadata)
    assert same_checkpoint(open_checkpoint(tmp_path / "c.safetensors"), open_checkpoint(tmp_path / "b.safetensors"))
    convert_file(tmp_path / "c.safetensors", tmp_path / "d.safetensors", "nunchaku")
    before, after = load_file(source), load_file(tmp_path / "d.safetensors")
    assert before.keys() == after.keys() and all(same_bytes(before[key], after[key]) for key in before)


def test_what_cannot_be_done_leaves_nothing(tmp_path):
    source = save_model(tmp_path / "flux.safetensors", stored_model("flux"))
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"older")

    class Stop(Exception):
        pass

    def stop(done, total, layer):
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        convert_file(source, out, "native", progress=stop)
    with pytest.raises(CheckpointError, match="is the source"):
        convert_file(source, source, "native")
    layer = random_layer("int4", 64, 64, 16)
    foreign = save_model(tmp_path / "x.safetensors", native.encode_layer("blocks.0.proj", layer))
    with pytest.raises(CheckpointError, match="no names for family"):
        convert_file(foreign, out, "nunchaku")
    assert out.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux.safetensors", "out.safetensors", "x.safetensors"]


def test_progress_counts_layers_and_ends_full(tmp_path):
    seen = []
    source = save_model(tmp_path / "flux.safetensors", stored_model("flux"))
    convert_file(source, tmp_path / "out.safetensors", "nunchaku", progress=lambda *step: seen.append(step))
    total = len(open_checkpoint(source).specs)
    assert seen[0][:2] == (0, total) and seen[-1] == (total, total, "") and len(seen) == total + 1


@pytest.mark.parametrize("part", ["proj_down", "smooth_factor"])
def test_a_part_without_its_layer_is_not_converted_as_is(tmp_path, part):
    """What was written could not be opened again."""
    tensors = stored_model("flux", lite=True) | {"blocks.7.proj." + part: torch.ones(16)}
    save_model(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=rf"^a.safetensors: blocks.7.proj.{part} is named like a part"):
        convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "native", as_is=True)


@pytest.mark.parametrize("format", FORMATS)
def test_as_is_keeps_names_of_models_without_a_family(tmp_path, format):
    layer = random_layer(format, 256, 128, 16 * FORMATS[format].low_rank, dtype=torch.bfloat16)
    tensors = native.encode_layer("some.thing.3", layer) | {"some.thing.3.bias": torch.randn(256).bfloat16()}
    source = save_model(tmp_path / "a.safetensors", tensors)
    convert_file(source, tmp_path / "b.safetensors", "nunchaku", as_is=True)
    convert_file(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "native", as_is=True)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "c.safetensors")
    assert before.specs == after.specs and before.rest == after.rest
    read = after.layer("some.thing.3")
    for part, tensor in layer.tensors.items():
        tolerance = 0.02 if part == "wzeros" else 0
        assert torch.allclose(read[part].float(), tensor.float(), rtol=0, atol=tolerance)


def test_scales_whose_zeros_are_no_numbers_there_are_refused(tmp_path):
    """What was written held Inf, and could not be read."""
    tensors = native.encode_layer("some.thing.3", random_layer("awq_w4a16", 256, 128, dtype=torch.bfloat16))
    tensors["some.thing.3.weight_scale"][0, 0] = torch.finfo(torch.bfloat16).max
    source = save_model(tmp_path / "a.safetensors", tensors | {"some.thing.3.bias": torch.zeros(256).bfloat16()})
    with pytest.raises(CheckpointError, match=r"^a.safetensors: layer 'some.thing.3': has scales up to 3.39e\+38"):
        convert_file(source, tmp_path / "b.safetensors", "nunchaku", as_is=True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantize", "convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_command_line(tmp_path):
    source = save_model(tmp_path / "flux.safetensors", stored_model("flux"))
    done = run(source, tmp_path / "out.safetensors", "--to", "kitchen", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and (result["from"], result["to"], result["family"]) == ("nunchaku", "kitchen", "flux")
    assert result["layers"] == 13 and "linear2" in result["notes"][0]
    done = run(source, tmp_path / "names.safetensors", "--to", "native", "--as-is")
    assert done.returncode == 0 and "15 layers, nunchaku -> native" in done.stdout
    assert "single_transformer_blocks.0.mlp_fc2.weight" in load_file(tmp_path / "names.safetensors")
    done = run(tmp_path / "none.safetensors", tmp_path / "x.safetensors", "--to", "native")
    assert done.returncode == 1 and done.stdout == "" and "there is no such file" in done.stderr
    assert run(source, tmp_path / "x.safetensors", "--to", "elsewhere").returncode == 2
    assert not (tmp_path / "x.safetensors").exists()
