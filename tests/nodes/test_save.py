"""ComfyUI's own save nodes on a 4-bit MODEL: what they write opens again, as the same model."""

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI: set COMFYUI_PATH")

import comfy.sd
import comfy.utils
import folder_paths
from safetensors.torch import load_file, save_file

from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.nodes.host.source import ModelSource
from svdquant_pack.nodes.lora_limits import SVDQuantLoraLimits
from svdquant_pack.quantize.cli.verify import verify
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.part import HEADER
from svdquant_pack.quantize.files.tensor_file import TensorFile
from svdquant_pack.quantize.lora.deltas import LoraError
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.pretended_vram import pretend
from svdquant_pack.tests.nodes.sampling import LORAS, forward, relative

PREFIX = "model.diffusion_model."


def with_lora(patcher, strength=1.0):
    lora = comfy.utils.load_torch_file(str(LORAS / "svdquant_demo_inverted_kohya.safetensors"), safe_load=True)
    return comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The file that ComfyUI's node ModelSave writes of a MODEL."""
    from comfy_extras.nodes_model_merging import ModelSave

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))

    def save(patcher):
        node = ModelSave()
        node.output_dir = str(tmp_path)
        before = set(tmp_path.rglob("*.safetensors"))
        node.save(patcher, "saved/model")
        (path,) = set(tmp_path.rglob("*.safetensors")) - before
        return path

    return save


def same_numbers(one, other):
    """Every layer and every other tensor, bit for bit but for the width of a float."""
    assert one.specs == other.specs and one.rest.keys() == other.rest.keys()
    for name in one.specs:
        left, right = one.layer(name).tensors, other.layer(name).tensors
        assert left.keys() == right.keys()
        assert all(torch.equal(left[part], right[part]) and left[part].dtype == right[part].dtype for part in left)
    for name in one.rest:
        assert torch.equal(one.tensor(name).double(), other.tensor(name).double()), name


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_a_saved_model_reopens_bit_equal(checkpoints, saved, format):
    patcher = load_model(str(checkpoints[format]))
    path = saved(patcher)
    written = TensorFile(path)
    assert "svdquant" not in written.metadata and not written.has_checksums
    assert all(key.startswith(PREFIX) for key in written)
    stored, found = open_checkpoint(checkpoints[format]), open_checkpoint(path)
    same_numbers(stored, found)
    assert found.dialect == "native" and found.provenance.family == stored.provenance.family
    assert found.provenance.pinned == stored.provenance.pinned
    again = load_model(str(path))
    assert torch.equal(forward(again), forward(patcher))
    assert saved(again).read_bytes() == path.read_bytes()  # and once more


@pytest.mark.parametrize("name", ["chroma", "flux2", "qwen_image", "sdxl", "z_image"])
def test_models_of_published_families_reopen_as_they_were(name, tmp_path, saved):
    if reason := zoo.missing(name):
        pytest.skip(reason)
    made, source = tmp_path / "made.safetensors", zoo.save(name, tmp_path / "16bit.safetensors")
    quantize_model(ModelSource(load_pinned_model(str(source))), made, Recipe(rank=16, alternations=1))
    patcher = load_model(str(made), "w16")
    path = saved(patcher)
    same_numbers(open_checkpoint(made), open_checkpoint(path))
    assert torch.equal(zoo.forward(load_model(str(path), "w16"), name), zoo.forward(patcher, name))


def test_a_lora_is_a_part_of_what_is_saved(checkpoints, saved):
    bare = load_model(str(checkpoints["int4"]), "w16")
    patched = with_lora(bare, 0.8)
    path, stored = saved(patched), open_checkpoint(checkpoints["int4"])
    found = open_checkpoint(path)
    assert any(spec.rank > stored.specs[name].rank for name, spec in found.specs.items())
    again = load_model(str(path), "w16")
    assert relative(forward(again), forward(patched)) < 2e-3  # factors are rounded to 16 bit once more
    assert relative(forward(again), forward(bare)) > 0.1
    same_numbers(open_checkpoint(saved(bare)), stored)  # and none of it is left


def test_a_lora_is_refused_by_name_where_that_is_chosen(checkpoints, saved):
    bare = load_model(str(checkpoints["int4"]))
    (refusing,) = SVDQuantLoraLimits().limit(bare, 256, 0.02, "refuse")
    with pytest.raises(LoraError, match=r"4-bit layers, first \S+, have a LoRA.*when_saved"):
        saved(with_lora(refusing))
    same_numbers(open_checkpoint(saved(refusing)), open_checkpoint(checkpoints["int4"]))


def test_verify_says_what_is_checked_without_checksums(checkpoints, saved):
    path = saved(load_model(str(checkpoints["nvfp4"])))
    verdict = verify(path)
    assert not verdict.problems and "no checksums: dtypes, shapes and finite values were checked" in verdict.text
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("img_in.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    assert "img_in.weight" in " ".join(verify(path).problems)


def test_the_tensor_with_the_header_is_bounded_and_checked(checkpoints, saved, tmp_path):
    tensors = load_file(saved(load_model(str(checkpoints["int4"]))))
    for number, bad in enumerate((b"no json", b'{"svdquant": 3}', b"[]")):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors | {PREFIX + HEADER: torch.frombuffer(bytearray(bad), dtype=torch.uint8)}, path)
        with pytest.raises(ValueError, match=HEADER):
            open_checkpoint(path)
    assert HEADER not in load_file(checkpoints["int4"])
    assert TensorFile(checkpoints["int4"]).has_checksums


def test_without_pins_the_error_says_where_they_would_be(checkpoints, saved, tmp_path):
    """A model of another size than ComfyUI expects, saved without them by an older version."""
    tensors = load_file(saved(load_model(str(checkpoints["int4"]))))
    del tensors[PREFIX + HEADER]
    path = tmp_path / "old.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match="says nothing of the model's configuration"):
        load_model(str(path))


@pytest.mark.parametrize("budget", [1 << 40, 700_000, 0])
def test_under_dynamic_vram_the_same_is_written(checkpoints, saved, monkeypatch, budget):
    """There the host fetches and patches weights one by one while it writes them."""
    pytest.importorskip("comfy_aimdo", reason="this ComfyUI has no dynamic VRAM")
    bias = "diffusion_model.double_blocks.0.img_attn.qkv.bias"  # of a 4-bit layer, and patched by the host
    plain = saved(load_model(str(checkpoints["int4"])))
    patched = with_lora(load_model(str(checkpoints["int4"])))
    number = torch.full_like(comfy.utils.get_attr(patched.model, bias), 0.25)
    patched.add_patches({bias: ("diff", (number,))}, 1.0)
    wanted = load_file(saved(patched))
    pretend(monkeypatch, budget)
    dynamic = load_model(str(checkpoints["int4"]))
    assert dynamic.is_dynamic()
    forward(dynamic)
    assert load_file(saved(dynamic)).keys() == load_file(plain).keys()
    same_numbers(open_checkpoint(saved(dynamic)), open_checkpoint(plain))
    other = with_lora(dynamic)
    other.add_patches({bias: ("diff", (number,))}, 1.0)
    found = load_file(saved(other))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.endswith(("_in.weight", ".bias")):  # patched by the host, and there rounded to the model's bf16
            assert torch.allclose(found[name].double(), tensor.double(), rtol=2**-7), name
        else:
            assert torch.equal(found[name].double(), tensor.double()), name
