"""The diffusion model in a file that holds more; a whole checkpoint made by the quantizer on the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.cli.main import main
from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.part import HEADER, header_tensor, model_part
from svdquant_pack.quantize.files.tensor_file import TensorFile, TensorFileError

PREFIX = "model.diffusion_model."
OTHERS = {"vae.encoder.conv_in.weight": torch.randn(4, 3, 3, 3), "text_encoders.t5.shared.weight": torch.randn(8, 4)}


def all_in_one(path):
    generator = torch.Generator().manual_seed(0)
    model = {f"blocks.{i}.proj.weight": torch.randn(128, 128, generator=generator) for i in range(2)}
    save_file({**OTHERS, **{f"{PREFIX}{name}": tensor for name, tensor in model.items()}}, path)
    return path


def test_a_whole_checkpoint_keeps_what_is_not_the_model(tmp_path):
    source, whole, alone = (tmp_path / f"{name}.safetensors" for name in ("source", "whole", "alone"))
    all_in_one(source)
    assert main(["quantize", str(source), str(whole), "--rank", "16", "--whole"]) == 0
    assert main(["quantize", str(source), str(alone), "--rank", "16"]) == 0
    stored = load_file(whole)
    assert all(torch.equal(stored[name], tensor) for name, tensor in OTHERS.items())
    assert {name for name in stored if not name.startswith(PREFIX)} == OTHERS.keys()
    model, same = open_checkpoint(whole), open_checkpoint(alone)
    assert model.specs == same.specs and model.rest == same.rest == {}
    for name in same.specs:
        left, right = model.layer(name).tensors, same.layer(name).tensors
        assert all(torch.equal(left[part], right[part]) for part in right)
    assert main(["verify", str(whole)]) == 0


def test_a_source_without_more_is_refused_before_anything_is_made(tmp_path, capsys):
    source, target = tmp_path / "source.safetensors", tmp_path / "whole.safetensors"
    save_file({"blocks.0.proj.weight": torch.randn(128, 128)}, source)
    assert main(["quantize", str(source), str(target), "--whole"]) == 1
    assert "holds a diffusion model alone" in capsys.readouterr().err and not target.exists()


def test_damage_beside_the_model_is_found(tmp_path, capsys):
    whole = tmp_path / "whole.safetensors"
    main(["quantize", str(all_in_one(tmp_path / "source.safetensors")), str(whole), "--rank", "16", "--whole"])
    tensors = load_file(whole)
    tensors["vae.encoder.conv_in.weight"][0] = float("nan")
    without = tmp_path / "without.safetensors"  # checksums, as a host saves it
    save_file(tensors | {f"{PREFIX}{HEADER}": header_tensor(TensorFile(whole).metadata)}, without)
    capsys.readouterr()
    assert main(["verify", str(without)]) == 1
    assert "vae.encoder.conv_in.weight holds NaN" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", [PREFIX, "model.model.", "diffusion_model.", ""])
def test_strings_of_a_header_come_from_the_tensor(tmp_path, prefix):
    """Under whatever prefix a host saves a model; those of a real header stand above them."""
    path, strings = tmp_path / "x.safetensors", {"svdquant": json.dumps({"family": "flux"}), "recipe": "{}"}
    tensors = {f"{prefix}a.weight": torch.ones(2), f"{prefix}{HEADER}": header_tensor(strings)}
    save_file(tensors | {"other": torch.zeros(1)}, path, {"recipe": "mine", "title": "x"})
    part = model_part(TensorFile(path))
    assert part.metadata == {"svdquant": strings["svdquant"], "recipe": "mine", "title": "x"}
    assert set(part) - {"other"} == {"a.weight"} and torch.equal(part.read("a.weight"), torch.ones(2))
    assert part.others == (("other",) if prefix else ())
    with pytest.raises(KeyError):
        part.read(HEADER)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"svdquant": 3}', b"\xff"])
def test_a_header_tensor_that_is_none_is_refused_by_name(tmp_path, text):
    path = tmp_path / "x.safetensors"
    save_file({f"{PREFIX}{HEADER}": torch.frombuffer(bytearray(text), dtype=torch.uint8)}, path)
    with pytest.raises(TensorFileError, match=HEADER):
        model_part(TensorFile(path))


def test_converting_a_saved_file_writes_a_real_header(tmp_path):
    alone, saved, native = (tmp_path / f"{name}.safetensors" for name in ("alone", "saved", "native"))
    main(["quantize", str(all_in_one(tmp_path / "source.safetensors")), str(alone), "--rank", "16"])
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in load_file(alone).items()}
    save_file(tensors | {f"{PREFIX}{HEADER}": header_tensor(TensorFile(alone).metadata)}, saved)
    convert_file(saved, native, "native")
    assert TensorFile(native).metadata == TensorFile(alone).metadata
    made, wanted = load_file(native), load_file(alone)
    assert made.keys() == wanted.keys() and all(torch.equal(made[name], wanted[name]) for name in wanted)
