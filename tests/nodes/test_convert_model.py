"""The convert node writes what the command line writes, under a name in ComfyUI's folder."""

import pytest

from svdquant_pack.nodes.convert_model import SVDQuantConvertModel
from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.tests.quantize.stored_models import save_model, stored_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """ComfyUI's model folder with one 4-bit file."""
    import folder_paths

    save_model(tmp_path / "four_bit.safetensors", stored_model("flux"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def test_the_node_converts_as_the_command_line_does(folder, tmp_path_factory):
    wanted = tmp_path_factory.mktemp("wanted") / "wanted.safetensors"
    report = convert_file(folder / "four_bit.safetensors", wanted, "kitchen")
    done = SVDQuantConvertModel().convert("four_bit.safetensors", "kitchen", "other")
    assert done["result"] == ("other.safetensors",)
    assert (folder / "other.safetensors").read_bytes() == wanted.read_bytes()
    first, *notes = done["ui"]["text"][0].splitlines()
    assert f"{report.layers} layers of family flux, nunchaku -> kitchen" in first and notes == list(report.notes)


def test_an_existing_file_is_not_overwritten_unasked(folder):
    node = SVDQuantConvertModel()
    (folder / "other.safetensors").write_bytes(b"an older file")
    with pytest.raises(ValueError, match="exists already"):
        node.convert("four_bit.safetensors", "native", "other")
    assert (folder / "other.safetensors").read_bytes() == b"an older file"
    node.convert("four_bit.safetensors", "native", "other", overwrite=True)
    assert (folder / "other.safetensors").read_bytes() != b"an older file"


def test_a_name_outside_the_folder_is_refused():
    assert SVDQuantConvertModel.VALIDATE_INPUTS("fine") is True
    assert "needed a name inside" in SVDQuantConvertModel.VALIDATE_INPUTS("../outside")
