"""Chroma as two community engines spell it, in files whose layers the reference packer has packed.

Its blocks are FLUX.1's, so the golden FLUX.1 file under the names of either engine is such a file.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.dialects.nunchaku.layers import V1
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.tests.quantize.golden import DIFFUSERS_DOUBLE, DIFFUSERS_SINGLE, FOLDER, path_of

GOLDEN = {"int4": "svdq-int4_r16-tinyflux", "nvfp4": "svdq-fp4_r16-tinyflux"}
PEER_KEYS = FOLDER.parent / "peer_keys"
WIDE, LAYERS = 96, 2
SECOND_MLP = {"double_blocks.0.img_mlp.2", "double_blocks.0.txt_mlp.2", "single_blocks.0.linear2"}
SPOOKNIK = {  # a module of FLUX.1's names -> of Diffusers', as its model class has them
    "transformer_blocks.0.": DIFFUSERS_DOUBLE,
    "single_transformer_blocks.0.": DIFFUSERS_SINGLE,
}


def plain() -> dict[str, torch.Tensor]:
    """What both engines take over from Diffusers as it is."""
    seed = torch.Generator().manual_seed(0)
    h, network = 128, "distilled_guidance_layer"
    sizes = {"x_embedder": (h, 64), "context_embedder": (h, 64), "proj_out": (64, h)}
    sizes |= {f"{network}.in_proj": (WIDE, 64), f"{network}.out_proj": (h, WIDE)}
    sizes |= {f"{network}.layers.{i}.linear_{j}": (WIDE, WIDE) for i in range(LAYERS) for j in (1, 2)}
    tensors = {f"{name}.weight": torch.randn(*size, generator=seed) for name, size in sizes.items()}
    tensors |= {f"{name}.bias": torch.randn(size[0], generator=seed) for name, size in sizes.items()}
    tensors |= {f"{network}.norms.{i}.weight": torch.ones(WIDE) for i in range(LAYERS)}
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def chroma(precision: str, engine: str) -> dict[str, torch.Tensor]:
    tensors = plain()
    for key, tensor in load_file(path_of(GOLDEN[precision])).items():
        block = next((each for each in SPOOKNIK if key.startswith(each)), None)
        module, _, suffix = key.removeprefix(block or "").rpartition(".")
        if block is None or module in ("norm1.linear", "norm1_context.linear", "norm.linear"):
            continue
        if module.startswith("norm_"):
            module = f"attn.{module}"
        elif engine == "spooknik":
            module = SPOOKNIK[block].get(module, module)
            suffix = {first: second for second, first in V1.items()}.get(suffix, suffix)
        tensors[f"{block}{module}.{suffix}"] = tensor
    return tensors


def opened(tmp_path, tensors):
    save_file(tensors, tmp_path / "chroma.safetensors")
    return open_checkpoint(tmp_path / "chroma.safetensors")


@pytest.mark.parametrize("precision", GOLDEN)
@pytest.mark.parametrize("engine", ["spooknik", "tonera"])
def test_every_layer_is_the_packers_and_signed_as_the_engine_has_it(tmp_path, precision, engine):
    found, flux = opened(tmp_path, chroma(precision, engine)), open_checkpoint(path_of(GOLDEN[precision]))
    assert found.provenance.family == "chroma" and [engine in note for note in found.notes] == [True]
    modulation = {name for name in flux.specs if name.endswith(".lin")}
    assert found.specs.keys() == flux.specs.keys() - modulation
    unsigned = {name for name, spec in found.specs.items() if spec.act_unsigned != (0, 0)}
    assert unsigned == (SECOND_MLP if precision == "int4" and engine == "spooknik" else set())
    for name in found.specs:
        ours, theirs = found.layer(name).tensors, flux.layer(name).tensors
        assert all(torch.equal(ours[part], theirs[part]) for part in theirs), name
        assert torch.equal(found.tensor(f"{name}.bias"), flux.tensor(f"{name}.bias"))


@pytest.mark.parametrize("precision", GOLDEN)
def test_as_is_an_engine_has_the_same_signs(tmp_path, precision):
    for engine, count in (("tonera", 0), ("spooknik", 3 if precision == "int4" else 0)):
        save_file(chroma(precision, engine), tmp_path / "chroma.safetensors")
        found = open_checkpoint(tmp_path / "chroma.safetensors", as_is=True)
        assert sum(spec.act_unsigned != (0, 0) for spec in found.specs.values()) == count


def test_the_rest_has_comfyui_s_names(tmp_path):
    stored = chroma("int4", "tonera")
    found = opened(tmp_path, stored)
    network = "distilled_guidance_layer"
    for name, other in (
        ("img_in.weight", "x_embedder.weight"),
        ("final_layer.linear.bias", "proj_out.bias"),
        (f"{network}.layers.1.out_layer.weight", f"{network}.layers.1.linear_2.weight"),
        (f"{network}.norms.0.scale", f"{network}.norms.0.weight"),
        ("double_blocks.0.txt_attn.norm.key_norm.scale", "transformer_blocks.0.attn.norm_added_k.weight"),
    ):
        assert torch.equal(found.tensor(name), stored[other]), name


@pytest.mark.parametrize("precision", GOLDEN)
def test_tonera_s_loader_divides_three_int4_layers_by_smooth_orig(tmp_path, precision):
    stored, block = chroma(precision, "tonera"), "transformer_blocks.0"
    checkpoint = opened(tmp_path, stored)
    before = {name: checkpoint.layer(name)["smooth_factor"] for name in checkpoint.specs}  # its file is written over
    for module in ("qkv_proj", "qkv_proj_context", "mlp_context_fc2", "mlp_fc2", "out_proj"):
        stored[f"{block}.{module}.smooth_orig"] = stored[f"{block}.{module}.smooth"] * 2
    after = opened(tmp_path, stored)
    moved = {"double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv", "double_blocks.0.txt_mlp.2"}
    for name, smooth in before.items():
        factor = 2 if precision == "int4" and name in moved else 1
        assert torch.equal(after.layer(name)["smooth_factor"], smooth * factor), name


@pytest.mark.parametrize("precision", GOLDEN)
def test_what_spooknik_s_class_expects_is_read_and_written(tmp_path, precision):
    """Names, shapes, dtypes and signs as that class has them: recorded by tests/golden/record_chroma_keys.py."""
    record = json.loads((PEER_KEYS / f"chroma_{precision}_r32.json").read_text())
    expected = {key: (getattr(torch, dtype), tuple(shape)) for key, (dtype, shape) in record["tensors"].items()}
    seed = torch.Generator().manual_seed(0)
    tensors = {}
    for key, (dtype, shape) in expected.items():
        if key.endswith(".wcscales") and "qkv" not in key:
            tensors[key.replace("wcscales", "wtscale")] = torch.ones(1, dtype=torch.bfloat16)
            continue  # writers have them of joined layers alone; the loader fills in ones
        numbers = torch.rand(shape, generator=seed) + 0.1
        tensors[key] = torch.randint(-128, 128, shape, dtype=dtype) if dtype == torch.int8 else numbers.to(dtype)
    for block in range(record["config"]["num_single_layers"]):  # linear1 of ComfyUI's model divides its input once
        single = f"single_transformer_blocks.{block}"
        tensors[f"{single}.mlp_fc1.smooth_factor"] = tensors[f"{single}.attn.to_qkv.smooth_factor"].clone()
    found = opened(tmp_path, tensors)
    assert len(found.notes) == 1 and "spooknik" in found.notes[0]
    as_is = open_checkpoint(tmp_path / "chroma.safetensors", as_is=True)
    assert sorted(name for name, spec in as_is.specs.items() if spec.act_unsigned != (0, 0)) == record["unsigned"]
    convert_file(tmp_path / "chroma.safetensors", tmp_path / "native.safetensors", "native")
    convert_file(tmp_path / "native.safetensors", tmp_path / "back.safetensors", "nunchaku")
    written = load_file(tmp_path / "back.safetensors")
    upper = (".wcscales", ".wtscale")  # either, neither or both: the loader takes what there is
    expected = {key: value for key, value in expected.items() if not key.endswith(upper)}
    assert {key for key in written if not key.endswith(upper)} == expected.keys()
    assert {key: (written[key].dtype, tuple(written[key].shape)) for key in expected} == expected
