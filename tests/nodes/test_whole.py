"""One file with diffusion model, text encoders and VAE: saved by ComfyUI or made by the quantizer, opened again."""

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.sd
import comfy.supported_models
import folder_paths

from svdquant_pack.nodes.host.model import load_model
from svdquant_pack.nodes.load_checkpoint import SVDQuantLoadCheckpoint
from svdquant_pack.nodes.quantize_model import SVDQuantQuantizeModel
from svdquant_pack.quantize.cli.verify import verify
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.files.tensor_file import TensorFile
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.sampling import forward

ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3}
SMALL = {f"clip_{letter}_model_config": ENCODER for letter in "lg"}


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    path = folder / "4bit.safetensors"
    quantize_model(FileSource(zoo.save("sdxl", folder / "wide.safetensors")), path, Recipe(rank=16))
    return path


@pytest.fixture
def small_encoders(monkeypatch):
    """SDXL's two text encoders as ComfyUI builds them, but narrow and of three layers."""
    build = comfy.sd.CLIP.__init__

    def narrow(self, *args, model_options=None, **keywords):
        build(self, *args, model_options={**(model_options or {}), **SMALL}, **keywords)

    monkeypatch.setattr(comfy.sd.CLIP, "__init__", narrow)


def encoders():
    target = comfy.supported_models.SDXL({}).clip_target({})
    clip = comfy.sd.CLIP(target)
    generator = torch.Generator().manual_seed(3)
    for parameter in clip.cond_stage_model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return clip


def pixels():
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


@pytest.fixture
def checkpoints_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def encode(clip):
    return clip.encode_from_tokens(clip.tokenize("a red square"), return_pooled=True)


def test_what_comfyui_saves_whole_is_opened_whole(four_bit, small_encoders, checkpoints_folder):
    from comfy_extras.nodes_model_merging import CheckpointSave

    model, clip = load_model(str(four_bit)), encoders()
    node = CheckpointSave()
    node.output_dir = str(checkpoints_folder)
    node.save(model, clip, pixels(), "whole")
    (path,) = checkpoints_folder.glob("*.safetensors")
    assert SVDQuantLoadCheckpoint.VALIDATE_INPUTS(path.name) is True
    again, clip_again, vae = SVDQuantLoadCheckpoint().load(path.name, "auto")
    assert torch.equal(zoo.forward(again, "sdxl"), zoo.forward(model, "sdxl"))
    for one, other in zip(encode(clip_again), encode(clip), strict=True):
        assert one.abs().sum() and torch.equal(one, other)
    picture = torch.rand(1, 8, 8, 3)
    assert torch.equal(vae.decode(vae.encode(picture)), pixels().decode(pixels().encode(picture)))
    stored, found = open_checkpoint(four_bit), open_checkpoint(path)
    assert found.specs == stored.specs and found.rest.keys() == stored.rest.keys()


def test_what_the_quantizer_writes_whole_is_opened_whole(demo_model, small_encoders, checkpoints_folder):
    """The demo's model, which pins its configuration; its encoders would be T5, so this file has a VAE alone."""
    done = SVDQuantQuantizeModel().quantize("(model input)", "int4", 16, "made", model=demo_model, vae=pixels())
    file = TensorFile(checkpoints_folder / "made.safetensors")
    assert file.has_checksums and "svdquant" in file.metadata and done["result"][1] == "made.safetensors"
    assert {name for name in file if not name.startswith("model.diffusion_model.")} == {"vae.pixel_space_vae"}
    again, clip, vae = SVDQuantLoadCheckpoint().load("made.safetensors", "auto")
    assert torch.equal(forward(again), forward(done["result"][0])) and clip is None
    assert torch.equal(vae.decode(torch.ones(1, 3, 8, 8)), pixels().decode(torch.ones(1, 3, 8, 8)))
    assert verify(file.path).text.startswith("whole")


def test_a_model_alone_is_sent_to_the_other_node(four_bit, checkpoints_folder):
    (checkpoints_folder / "alone.safetensors").write_bytes(four_bit.read_bytes())
    with pytest.raises(ValueError, match=r"a diffusion model alone.*SVDQuant Load Model"):
        SVDQuantLoadCheckpoint().load("alone.safetensors", "auto")
