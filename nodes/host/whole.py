"""Bridge: a whole 4-bit checkpoint <-> MODEL, CLIP and VAE, the last two by ComfyUI's own code and names."""

from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher

from ...quantize.files.checkpoint import CheckpointError
from ...quantize.files.open import open_checkpoint
from ...quantize.files.part import PREFIX, Beside, model_part
from ...quantize.files.tensor_file import TensorInfo, open_tensors
from .guard import REFERENCE
from .model import load_model, pinned_config, pinned_loader


def load_whole(path: str, compute: str = "auto", if_not_finite: str = REFERENCE) -> tuple[ModelPatcher, Any, Any]:
    """(MODEL, CLIP, VAE) of a file that has all three.

    raises  CheckpointError naming the file, also for one that holds a diffusion model alone
    """
    part = model_part(open_tensors(path))
    if not part.others:
        raise CheckpointError(
            f"{part.path.name}: holds a diffusion model alone, without VAE and text encoders: put it into "
            "models/diffusion_models and load it with SVDQuant Load Model"
        )
    model = load_model(path, compute, if_not_finite)
    clip, vae = _beside(path, True, True)
    return model, clip, vae


def _beside(path: str, clip: bool, vae: bool, disable_dynamic: bool = False) -> tuple[Any, Any]:
    """CLIP and VAE of the file. ComfyUI sees names and shapes of the model, from which it knows its encoders."""
    checkpoint, part = open_checkpoint(path), model_part(open_tensors(path))
    tensors = {name: part.read_other(name) for name in part.others}
    for name, info in checkpoint.weight_infos().items():
        tensors[f"{PREFIX}{name}"] = torch.empty(info.shape, dtype=info.dtype, device="meta")
    load = pinned_loader(
        comfy.sd.load_state_dict_guess_config, checkpoint.path.name, pinned_config(checkpoint), disable_dynamic
    )
    found = load(
        tensors,
        output_clip=clip,
        output_vae=vae,
        output_model=False,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"custom_operations": comfy.ops.manual_cast},  # else some hosts look into the 4-bit layers
        metadata=part.metadata,
    )
    if found is None:
        raise CheckpointError(f"{checkpoint.path.name}: this ComfyUI does not know a model with these layers")
    _, found_clip, found_vae, _ = found
    # newer hosts build what they copy to another device from these
    for each, function in ((found_clip, _clip_patcher), (found_vae, _vae_patcher)):
        if getattr(each, "patcher", None) is not None:
            each.patcher.cached_patcher_init = (function, (path,))
    return found_clip, found_vae


def _clip_patcher(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    return _beside(path, True, False, disable_dynamic)[0].patcher


def _vae_patcher(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    return _beside(path, False, True, disable_dynamic)[1].patcher


def beside_of(model: ModelPatcher, clip: Any, vae: Any) -> Beside | None:
    """CLIP and VAE, patches included, as ComfyUI's checkpoints of this MODEL name their tensors; None without both."""
    config = model.model.model_config
    tensors: dict[str, torch.Tensor] = {}
    if clip is not None:
        lazy = hasattr(clip, "state_dict_for_saving")  # newer hosts patch a weight when it is asked for
        comfy.model_management.load_models_gpu([clip.load_model()], **({} if lazy else {"force_patch_weights": True}))
        tensors |= config.process_clip_state_dict_for_saving(clip.state_dict_for_saving() if lazy else clip.get_sd())
    if vae is not None:
        tensors |= config.process_vae_state_dict_for_saving(vae.get_sd())
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    return Beside(infos, lambda name: tensors[name].to("cpu")) if tensors else None
