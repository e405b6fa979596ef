"""Diffusers' names against what Diffusers' own conversion makes of ComfyUI's tensors (tests/golden/diffusers_names)."""

import json
import re
from pathlib import Path

import pytest
import torch

from svdquant_pack.quantize.families import FamilyError, detect
from svdquant_pack.quantize.files.diffusers import FOREIGN, TABLES, host_names, refuse_foreign
from svdquant_pack.quantize.files.tensor_file import TensorFileError, TensorInfo
from svdquant_pack.quantize.files.tensors import TensorView
from svdquant_pack.tests.quantize.test_families import GOLDEN, family_of, keys

RECORDED = Path(__file__).resolve().parents[1] / "golden" / "diffusers_names"
MODELS = {path.stem: json.loads(path.read_text())["tensors"] for path in sorted(RECORDED.glob("*.json"))}


def view(tensors: dict[str, torch.Tensor]) -> TensorView:
    return TensorView("x.safetensors", {key: TensorInfo.of(tensor) for key, tensor in tensors.items()}, tensors.get)


def host(model: str) -> dict[str, torch.Tensor]:
    """ComfyUI's tensors of a tiny model."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in keys(model).items()}


def diffusers(model: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as Diffusers has them."""
    return {
        name: torch.cat([tensors[key][start : start + count] for key, start, count in runs])
        for name, runs in MODELS[model].items()
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_model_in_diffusers_names_is_comfyuis_tensors(model):
    expected = host(model)
    stored = diffusers(model, expected)
    assert stored.keys() != expected.keys()
    found = host_names(view(stored))
    made = {key for runs in MODELS[model].values() for key, *_ in runs}
    assert set(found) == made
    assert detect(found) is family_of(model)
    for key in found:
        assert found.infos[key] == TensorInfo.of(expected[key]), key
        assert torch.equal(found.read(key), expected[key]), key
    assert expected.keys() - made <= {"norm_final.weight", "logit_scale"}, "what Diffusers leaves out"


@pytest.mark.parametrize("model", GOLDEN)
def test_comfyuis_own_names_stay(model):
    file = view(host(model))
    assert host_names(file) is file
    refuse_foreign(file)


@pytest.mark.parametrize("model", MODELS)
def test_one_table_knows_a_model(model):
    assert [name for name, table in TABLES.items() if table.is_of(MODELS[model])] == [host_names_table(model)]


def host_names_table(model: str) -> str:
    titles = {"flux": "FLUX.1", "flux2": "FLUX.2", "z_image": "Z-Image", "sd3": "SD3", "ltxv": "LTX-Video"}
    other = {"auraflow": "AuraFlow", "chroma": "Chroma", "hunyuan_video": "HunyuanVideo", "lumina2": "Lumina 2"}
    return (titles | other).get(model, "Wan")


def test_a_tensor_without_a_place_and_a_part_that_is_missing_are_named():
    stored = diffusers("flux", host("flux"))
    with pytest.raises(TensorFileError, match=r"x.safetensors: transformer_blocks.0.attn.lora.weight has no place"):
        host_names(view({**stored, "transformer_blocks.0.attn.lora.weight": torch.ones(1)}))
    del stored["transformer_blocks.1.attn.to_k.weight"]
    with pytest.raises(TensorFileError, match=r"double_blocks.1.img_attn.qkv.weight is made of 3 .*to_k is missing"):
        host_names(view(stored))
    stored = diffusers("flux", host("flux"))
    stored["transformer_blocks.1.attn.to_k.weight"] = torch.ones(128, 64)
    with pytest.raises(TensorFileError, match=r"double_blocks.1.img_attn.qkv.weight .* do not join"):
        host_names(view(stored))


@pytest.mark.parametrize("mark", FOREIGN)
def test_names_of_another_program_are_refused_in_one_line(mark):
    name = re.sub(r"\{([^,]+),[^}]*\}", r"\1", mark).replace("#", "0")
    with pytest.raises(FamilyError, match=r"x.safetensors: .* is a name that ComfyUI's models do not have") as error:
        refuse_foreign(view({name: torch.ones(2, 2)}))
    assert "\n" not in str(error.value)
