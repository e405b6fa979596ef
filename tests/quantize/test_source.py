"""16-bit files under ComfyUI's names, whatever their export called them."""

import pytest
import torch
from safetensors.torch import save_file

from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.files.tensor_file import TensorFileError
from svdquant_pack.tests.quantize.test_families import keys


def test_names_of_the_first_hunyuan_video_release_become_comfyuis(tmp_path):
    known = keys("hunyuan_video")
    names = (("_attn.qkv.", "_attn_qkv."), ("_mod.lin.", "_mod.linear."))
    older = {key.replace(*names[0]).replace(*names[1]): shape for key, shape in known.items()}
    assert older != known
    path = tmp_path / "model.safetensors"
    save_file({f"model.diffusion_model.{key}": torch.zeros(shape) for key, shape in older.items()}, path)
    source = FileSource(path)
    assert source.family == "hunyuan_video" and set(source.infos) == set(known)
    key = "double_blocks.0.img_attn.qkv.weight"
    assert tuple(source.tensor(key).shape) == source.infos[key].shape == known[key]


def test_an_fp8_file_is_read_with_its_scales(tmp_path):
    weight = torch.randn(128, 128).to(torch.float8_e4m3fn)
    scaled = {"blocks.0.proj.weight": weight, "blocks.0.proj.scale_weight": torch.tensor(0.5)}
    save_file({**scaled, "scaled_fp8": torch.empty(0)}, tmp_path / "x.safetensors")
    source = FileSource(tmp_path / "x.safetensors")
    assert set(source.infos) == {"blocks.0.proj.weight"}
    assert torch.equal(source.tensor("blocks.0.proj.weight"), (weight.float() * 0.5).bfloat16())


@pytest.mark.parametrize("scale", [torch.ones(7), torch.ones(0), torch.ones(2, 128), torch.ones((), dtype=torch.int8)])
def test_a_scale_that_does_not_fit_its_weight_is_refused_on_opening(tmp_path, scale):
    """It was an error of torch without a name, when the layer was read."""
    weight = torch.randn(128, 64).to(torch.float8_e4m3fn)
    save_file({"blocks.0.proj.weight": weight, "blocks.0.proj.scale_weight": scale}, tmp_path / "x.safetensors")
    with pytest.raises(TensorFileError, match=r"^x.safetensors: the scale of blocks.0.proj.weight has shape"):
        FileSource(tmp_path / "x.safetensors")
