"""A model in Diffusers' names becomes a file that the host loads; what it could not load is refused before."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

from svdquant_pack.nodes.host.files import find_source, source_choices
from svdquant_pack.nodes.host.model import load_model
from svdquant_pack.nodes.host.openable import known_to_host, refuse_unopenable
from svdquant_pack.quantize.families import FamilyError
from svdquant_pack.quantize.files.checkpoint import CheckpointError
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.quantize.test_diffusers import MODELS, diffusers

RECIPE = Recipe(rank=16, alternations=1)


@pytest.mark.parametrize("name", ["flux", "sd3", "z_image"])
def test_a_model_in_diffusers_names_loads_and_paints_what_the_same_model_in_comfyuis_names_does(name, tmp_path):
    source = zoo.save(name, tmp_path / "host.safetensors")
    stored = {key: tensor.contiguous() for key, tensor in diffusers(name, load_file(source)).items()}
    save_file(stored, tmp_path / "diffusers.safetensors", {"config": json.dumps(zoo.config_of(name))})
    pictures = []
    for file in ("host", "diffusers"):
        opened = FileSource(tmp_path / f"{file}.safetensors", known_to_host)
        refuse_unopenable(opened, RECIPE)
        quantize_model(opened, tmp_path / f"{file}_4bit.safetensors", RECIPE)
        pictures.append(zoo.forward(load_model(str(tmp_path / f"{file}_4bit.safetensors"), "w16"), name))
    assert torch.equal(*pictures)


def test_a_unet_in_diffusers_names_is_what_the_host_itself_makes_of_it(tmp_path):
    import comfy.utils

    tensors = load_file(zoo.save("sdxl", tmp_path / "x.safetensors"))
    names = comfy.utils.unet_to_diffusers(zoo.config_of("sdxl"))
    stored = {name: tensors[key] for name, key in names.items() if key in tensors and "class_embedding" not in name}
    save_file(stored, tmp_path / "y.safetensors")
    source = FileSource(tmp_path / "y.safetensors")
    assert source.family == "sdxl" and list(source.infos) == sorted(tensors)
    assert all(torch.equal(source.tensor(key), tensor) for key, tensor in tensors.items())


def test_a_model_that_the_host_does_not_have_is_refused_at_once(tmp_path):
    save_file({f"blocks.{i}.proj.weight": torch.ones(128, 128) for i in range(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x.safetensors: this ComfyUI has no model with these layers"):
        refuse_unopenable(FileSource(tmp_path / "x.safetensors", known_to_host), RECIPE)
    names = {"single_transformer_blocks.0.attn.to_q.weight": torch.ones(128, 128)}
    save_file(names, tmp_path / "y.safetensors")
    with pytest.raises(FamilyError, match=r"y.safetensors: single_transformer_blocks.0.attn.to_q.weight is a name"):
        FileSource(tmp_path / "y.safetensors", known_to_host)


def test_layers_beyond_the_hosts_model_are_refused_at_once(tmp_path):
    source = zoo.save("flux", tmp_path / "x.safetensors")
    tensors = load_file(source)
    tensors |= {"double_blocks.7.img_attn.qkv.weight": tensors["double_blocks.0.img_attn.qkv.weight"].clone()}
    save_file(tensors, source, {"config": json.dumps(zoo.config_of("flux"))})
    with pytest.raises(CheckpointError, match=r"1 layers .* first 'double_blocks.7.img_attn.qkv'"):
        refuse_unopenable(FileSource(source, known_to_host), RECIPE)


def test_a_configuration_that_no_file_may_have_is_refused_before_anything_is_built(tmp_path):
    source = zoo.save("flux", tmp_path / "x.safetensors")
    config = zoo.config_of("flux") | {"depth": 1 << 30}
    save_file(load_file(source), source, {"config": json.dumps(config)})
    with pytest.raises(CheckpointError, match=r"x.safetensors: depth of the model is"):
        refuse_unopenable(FileSource(source, known_to_host), RECIPE)


def test_gguf_and_folders_of_diffusers_are_among_the_choices(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    folder_paths.cache_helper.clear()
    (tmp_path / "sub").mkdir()
    (tmp_path / "flux" / "transformer").mkdir(parents=True)
    for name in ("a.gguf", "sub/b.gguf", "flux/model_index.json", "plain.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(folder_paths, "filename_list_cache", {}, raising=False)
    choices = source_choices()
    assert {"a.gguf", "sub/b.gguf", "flux", "plain.safetensors"} <= set(choices)
    assert find_source("flux") == tmp_path / "flux" and find_source("sub/b.gguf") == tmp_path / "sub" / "b.gguf"
    assert find_source("../x.gguf") is None


@pytest.mark.parametrize("name", MODELS)
def test_the_names_of_a_model_are_known_without_its_memory(name, tmp_path):
    """Where that is so, a layer without a place is seen in the first second."""
    from svdquant_pack.nodes.host.openable import _config, _names

    if zoo.missing(name):
        pytest.skip(zoo.missing(name))
    source = FileSource(zoo.save(name, tmp_path / "x.safetensors"))
    names = _names(_config(source), source)
    assert names is not None and {key for key in source.infos if key.endswith(".weight")} <= names | {
        "norm_final.weight"
    }
