"""What a file may pin of the host's model: known keys of their type, and nothing larger than its own tensors."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.nodes.host.model import load_model, load_pinned_model
from svdquant_pack.quantize.files.checkpoint import CheckpointError
from svdquant_pack.quantize.files.tensor_file import TensorFile

BOMBS = {
    "depth_single_blocks": 20000,
    "depth": True,
    "num_heads": 0,
    "axes_dim": [1],
    "operations": "torch.nn",
    "device": "cuda:7",
    "dtype": "os.system",
    "theta": "x",
    "hidden_size": 1 << 40,
    "in_channels": -1,
    "context_in_dim": 3.5,
    "mlp_ratio": 1e9,
    "qkv_bias": "yes",
    "patch_size": [2] * 1000,
    "image_model": "../../x",
    "guidance_embed": None,
    "__class__": "x",
}


@pytest.mark.parametrize("key", BOMBS)
def test_a_pinned_bomb_is_refused_by_name_at_once(checkpoints, tmp_path, key):
    file = TensorFile(checkpoints["int4"])
    svdquant, config = (json.loads(file.metadata[name]) for name in ("svdquant", "unet_config"))
    svdquant["pinned"] = sorted({*svdquant["pinned"], key})
    metadata = file.metadata | {"svdquant": json.dumps(svdquant), "unet_config": json.dumps(config | {key: BOMBS[key]})}
    save_file(load_file(file.path), tmp_path / "bomb.safetensors", metadata)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=rf"^bomb.safetensors: .*{key}"):
        load_model(str(tmp_path / "bomb.safetensors"))
    assert time.process_time() - start < 1


@pytest.mark.parametrize("key", BOMBS)
def test_the_configuration_of_a_16bit_file_is_checked_alike(demo_file, tmp_path, key):
    file = TensorFile(demo_file)
    config = json.loads(file.metadata["config"]) | {key: BOMBS[key]}
    save_file(load_file(demo_file), tmp_path / "bomb.safetensors", {"config": json.dumps(config)})
    with pytest.raises(CheckpointError, match=rf"^bomb.safetensors: .*{key}"):
        load_pinned_model(str(tmp_path / "bomb.safetensors"))


def test_names_alone_do_not_make_room_for_a_large_model(demo_file, tmp_path):
    """3,000 tensors of one number count as blocks; that many blocks of this hidden size would not fit into the file."""
    file, tensors = TensorFile(demo_file), load_file(demo_file)
    bias = next(tensor for tensor in tensors.values() if tensor.ndim == 1)[:1].clone()
    tensors |= {f"single_blocks.{place}.x": bias.clone() for place in range(100, 3100)}
    config = json.loads(file.metadata["config"]) | {"depth_single_blocks": 3000}
    save_file(tensors, tmp_path / "bomb.safetensors", {"config": json.dumps(config)})
    with pytest.raises(CheckpointError, match=r"^bomb.safetensors: the file sets a model of 300\d blocks"):
        load_pinned_model(str(tmp_path / "bomb.safetensors"))


def test_what_the_host_cannot_build_names_file_and_configuration(demo_file, tmp_path):
    """Each value is legal, together they are not."""
    config = json.loads(TensorFile(demo_file).metadata["config"]) | {"axes_dim": [2, 2, 2]}
    save_file(load_file(demo_file), tmp_path / "odd.safetensors", {"config": json.dumps(config)})
    with pytest.raises(CheckpointError, match=r"^odd.safetensors: ComfyUI cannot build.*axes_dim \[2, 2, 2\]"):
        load_pinned_model(str(tmp_path / "odd.safetensors"))


def test_tensors_that_the_host_cannot_build_a_model_of_name_the_file(demo_file, tmp_path):
    """Without its configuration the demo would need 24 heads; the host's error had no file in it."""
    save_file(load_file(demo_file), tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match=r"^bare.safetensors: ComfyUI cannot build.*num_heads 24"):
        load_pinned_model(str(tmp_path / "bare.safetensors"))


def test_tensors_of_other_shapes_than_the_model_has_name_the_file(demo_file, tmp_path):
    """torch's list of shapes had no file in it."""
    tensors, metadata = load_file(demo_file), TensorFile(demo_file).metadata
    name = next(name for name in tensors if name.endswith("query_norm.scale"))
    save_file(tensors | {name: torch.ones(3)}, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"(?s)^odd.safetensors: ComfyUI cannot build a model.*size mismatch"):
        load_pinned_model(str(tmp_path / "odd.safetensors"))
