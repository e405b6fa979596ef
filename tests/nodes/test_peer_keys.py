"""What we write for Nunchaku is what Nunchaku's own classes expect: every name, shape and dtype, and the configuration.

`tests/golden/peer_keys` was recorded from those classes, not from this pack. tests/peer_load.py does the load itself.
"""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("comfy.lora", reason="no ComfyUI: set COMFYUI_PATH")

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.families import FAMILIES
from svdquant_pack.quantize.files.checkpoint import Provenance
from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.dialects import native
from svdquant_pack.quantize.files.header import metadata_of
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.files.tensor_file import TensorInfo
from svdquant_pack.quantize.maker.model import plan_layers, quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.kernels.layers import random_layer
from svdquant_pack.tests.nodes import zoo
from svdquant_pack.tests.nodes.zoo_models import UNET_SIZES
from svdquant_pack.tests.quantize.golden import DIFFUSERS_DOUBLE, DIFFUSERS_SINGLE

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "peer_keys"
DTYPES = {torch.bfloat16: "bfloat16", torch.int8: "int8", torch.int32: "int32", torch.float8_e4m3fn: "float8_e4m3fn"}
# of a model's configuration: what no tensor shows and ComfyUI's class has as a constant, with the constant
CONSTANTS = {"sample_size": 128, "addition_time_embed_dim": 256}
# Diffusers' feed-forward of the tiny Z-Image is 682 wide, which no 4-bit group divides; ComfyUI rounds up to 256, and
# both have 10240 in the real one
Z_IMAGE_SIZES = {682: 768, 1364: 1536, 341: 384, 682 // 64: 12, 682 // 16: 48}
SDXL = UNET_SIZES | {  # the UNet of the recorded class
    "channel_mult": [1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
}


def recorded() -> dict[str, dict[str, Any]]:
    """name -> what was recorded; the largest lie compressed"""
    found = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
    found |= {
        path.name.removesuffix(".json.gz"): json.loads(gzip.decompress(path.read_bytes()))
        for path in FOLDER.glob("*.gz")
    }
    return dict(sorted(found.items()))


CLASSES = {
    "NunchakuFluxTransformer2DModelV2": "flux",
    "NunchakuQwenImageTransformer2DModel": "qwen_image",
    "NunchakuZImageTransformer2DModel": "z_image",
    "NunchakuSDXLUNet2DConditionModel": "sdxl",
}
RECORDED = {
    name: one for name, one in recorded().items() if one["class"] in CLASSES
}  # of others: the family's own test
SUFFIXES = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
DOUBLE = DIFFUSERS_DOUBLE | {name: f"attn.{name}" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
SINGLE = DIFFUSERS_SINGLE | {name: f"attn.{name}" for name in ("norm_q", "norm_k")}


def renamed(key: str) -> str:
    """A key of the first generation as the class for the second renames it: nunchaku's `convert_flux_state_dict`"""
    module, _, suffix = key.rpartition(".")
    head, _, rest = module.partition("transformer_blocks.")
    number, _, name = rest.partition(".")
    if rest and not head.endswith("attentions."):
        name = (SINGLE if head == "single_" else DOUBLE).get(name, name)
    module = f"{head}transformer_blocks.{number}.{name}" if rest and "attentions" not in head else module
    return f"{module}.{SUFFIXES.get(suffix, suffix)}" if module else suffix


def native_of(family: str, skip_refiners: bool, recipe: Recipe, folder: Path) -> Path:
    """ComfyUI's own model of the sizes that were recorded, quantized."""
    path = folder / "native.safetensors"
    if family == "sdxl":
        return random_unet(recipe, path)
    with pytest.MonkeyPatch.context() as patch:
        if skip_refiners:  # as a file has it whose refiners its maker left in 16 bit
            table = FAMILIES[family]
            layers = tuple(entry.replace("{layers,noise_refiner,context_refiner}", "layers") for entry in table.w4a4)
            patch.setitem(FAMILIES, family, replace(table, w4a4=layers))
        quantize_model(FileSource(zoo.save(family, folder / "16bit.safetensors")), path, recipe)
    return path


def random_unet(recipe: Recipe, path: Path) -> Path:
    """A UNet of random layers: to quantize one takes minutes, and what is looked at here are names and sizes."""
    import comfy.model_detection

    settings = comfy.model_detection.model_config_from_unet_config(SDXL)
    with torch.device("meta"):
        shapes = {key: tuple(one.shape) for key, one in settings.get_model({}, "").diffusion_model.state_dict().items()}
    plan = plan_layers(
        {key: TensorInfo(shape, torch.bfloat16) for key, shape in shapes.items()}, FAMILIES["sdxl"], recipe
    )
    tensors = {
        key: torch.zeros(shape, dtype=torch.bfloat16)
        for key, shape in shapes.items()
        if key.removesuffix(".weight") not in plan.specs
    }
    for name, spec in plan.specs.items():
        tensors |= native.encode_layer(name, random_layer(spec.format, spec.n, spec.k, spec.rank, dtype=torch.bfloat16))
    save_file(tensors, path, metadata_of(Provenance("sdxl", SDXL), plan.specs))
    return path


@pytest.fixture(scope="module", params=RECORDED)
def written(request, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """What was recorded, and the file that we write."""
    expected, folder = RECORDED[request.param], tmp_path_factory.mktemp("peer")
    family, skip = CLASSES[expected["class"]], expected["options"].get("skip_refiners", False)
    recipe = Recipe(format=expected["precision"], rank=expected["rank"], branches="shared", alternations=1)
    source = native_of(family, skip, recipe, folder)
    convert_file(source, folder / "nunchaku.safetensors", "nunchaku")
    return expected, folder / "nunchaku.safetensors"


def test_names_shapes_and_dtypes_are_those_of_the_class(written):
    expected, path = written
    found = {renamed(key): (DTYPES[info.dtype], list(info.shape)) for key, info in load_file(path).items()}
    sizes = Z_IMAGE_SIZES if CLASSES[expected["class"]] == "z_image" else {}
    wanted = {
        key: (dtype, [sizes.get(size, size) for size in shape]) for key, (dtype, shape) in expected["tensors"].items()
    }
    for key in [key for key in wanted if key.startswith("t_embedder.mlp.")]:
        dtype, shape = wanted[key]
        wanted[key] = dtype, [256 if size == 1024 else size for size in shape]  # ComfyUI's is no wider than the model
    if expected["class"] != "NunchakuSDXLUNet2DConditionModel":
        # all classes but SDXL's take wtscale off and put ones where wcscales is missing: nunchaku's `patch_scale_key`
        found = {key: info for key, info in found.items() if not key.endswith(".wtscale")}
        wanted = {key: info for key, info in wanted.items() if not key.endswith(".wcscales") or key in found}
    assert found.keys() == wanted.keys()
    assert found == wanted


def test_the_header_holds_what_the_class_is_built_from(written):
    expected, path = written
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stated = json.loads(metadata["quantization_config"])
    assert stated["rank"] == expected["rank"]
    assert stated.get("skip_refiners", False) == expected["options"].get("skip_refiners", False)
    config = json.loads(metadata["config"])
    assert {key: config.get(key) for key in expected["config"]} == {
        key: CONSTANTS.get(key, value) for key, value in expected["config"].items()
    }
