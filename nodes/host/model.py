"""Bridge: checkpoint -> ComfyUI's own model with 4-bit layers in place, and back to the tensors of a loaded MODEL."""

import inspect
import logging
import types
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.lora
import comfy.model_detection
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...kernels.dispatch import arch_of, faster_format
from ...quantize.files.checkpoint import CheckpointError
from ...quantize.files.describe import describe
from ...quantize.files.open import open_checkpoint
from ...quantize.files.source import FileSource
from ...quantize.files.tensor_file import TensorInfo
from .linear import operations
from .patcher import PREFIX, SVDQuantPatcher, adopt, layer_name

ATTACHMENT = "svdquant"
FASTER = "runs, but a file of this model in {} would be faster: this GPU computes those in 4 bit"
log = logging.getLogger("svdquant")


def load_model(path: str, compute: str = "auto", disable_dynamic: bool = False) -> ModelPatcher:
    """ComfyUI's own model of a 4-bit checkpoint, as a MODEL.

    The host finds the architecture from names and shapes; only what the file pins is taken from its header.

    raises  CheckpointError naming file, layer and reason
    """
    checkpoint = open_checkpoint(path)
    checkpoint.check_compute(compute)
    state_dict = {name: checkpoint.tensor(name) for name in checkpoint.rest}
    for name, spec in checkpoint.specs.items():  # stand-ins without memory: detection and LoRA names look at them
        state_dict[f"{name}.weight"] = torch.empty(spec.n, spec.k, dtype=checkpoint.dtype, device="meta")
    provenance = checkpoint.provenance
    pinned = {key: provenance.unet_config[key] for key in provenance.pinned if key in provenance.unet_config}
    options = {"custom_operations": operations(checkpoint, compute)}
    patcher = _load_state_dict(state_dict, options, pinned, disable_dynamic)
    if patcher is None:
        raise CheckpointError(
            f"{checkpoint.path.name}: this ComfyUI does not know a model with these layers "
            f"(family {provenance.family}); a newer ComfyUI may"
        )
    adopt(patcher)
    unused = checkpoint.specs.keys() - set(map(layer_name, patcher.packed_layers()))
    if unused:
        raise CheckpointError(
            f"{checkpoint.path.name}: {len(unused)} 4-bit layers have no place in the model that ComfyUI built, "
            f"first {min(unused)!r}"
        )
    found = describe(checkpoint)
    patcher.set_attachments(ATTACHMENT, found)
    if faster := _faster_format(found["formats"], patcher.load_device):
        log.info("%s: %s", found["file"], FASTER.format(faster))
    patcher.cached_patcher_init = (load_model, (path, compute))  # newer hosts rebuild the model from this
    return patcher


def load_pinned_model(path: str) -> ModelPatcher:
    """A 16-bit file whose metadata holds the model configuration (`config`, JSON), as a MODEL."""
    source = FileSource(path)
    state_dict = {name: source.tensor(name) for name in source.infos}
    patcher = _load_state_dict(state_dict, {}, source.unet_config, disable_dynamic=False)
    if patcher is None:
        raise CheckpointError(f"{source.name}: this ComfyUI does not know a model with these layers")
    return patcher


def _load_state_dict(
    state_dict: dict[str, torch.Tensor], options: dict[str, Any], pinned: Mapping[str, Any], disable_dynamic: bool
) -> ModelPatcher | None:
    load = comfy.sd.load_diffusion_model_state_dict
    keywords = {"disable_dynamic": disable_dynamic} if "disable_dynamic" in inspect.signature(load).parameters else {}
    if pinned:
        load = _with_pinned_detection(load, pinned)
    return load(state_dict, model_options=options, **keywords)


def _with_pinned_detection(load: types.FunctionType, pinned: Mapping[str, Any]) -> types.FunctionType:
    """The host's loader, with its own detection overridden by `pinned`.

    The loader has no argument for it, and replacing the host's function for a moment would be seen by every other
    pack. So this is the loader's code with another `model_detection` among its globals.
    """

    class PinnedDetection:
        def __getattr__(self, name: str) -> Any:
            return getattr(comfy.model_detection, name)

        @staticmethod
        def model_config_from_unet(state_dict, prefix, *args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            found = comfy.model_detection.detect_unet_config(state_dict, prefix, metadata=metadata) or {}
            return comfy.model_detection.model_config_from_unet_config({**found, **pinned}, state_dict)

    scope = {**load.__globals__, "model_detection": PinnedDetection()}
    copy = types.FunctionType(load.__code__, scope, load.__name__, load.__defaults__, load.__closure__)
    copy.__kwdefaults__ = load.__kwdefaults__
    return copy


class ModelSource:
    """The weights of a loaded MODEL, LoRAs and merges included, as a quantize.Source.

    raises  ValueError if the model is 4-bit already
    """

    family = None

    def __init__(self, patcher: ModelPatcher) -> None:
        if isinstance(patcher, SVDQuantPatcher):
            raise ValueError("the model is 4-bit already; connect the 16-bit model that it was made from")
        self.name = f"the {type(patcher.model).__name__} model"
        self._patcher = patcher
        self._tensors = patcher.model.diffusion_model.state_dict()
        self.infos = {name: TensorInfo.of(tensor) for name, tensor in self._tensors.items()}
        config = dict(patcher.model.model_config.unet_config)
        self.unet_config = {key: value for key, value in config.items() if _is_plain(value)}
        stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in self._tensors.items()}
        found = comfy.model_detection.detect_unet_config(stand_ins, "") or {}
        config = self.unet_config
        # what the class adds by itself is not pinned: another ComfyUI may want other values there
        own = patcher.model.model_config.unet_extra_config
        self.pinned = tuple(
            key for key in config if key not in own and not (key in found and _same(found[key], config[key]))
        )

    def tensor(self, key: str) -> torch.Tensor:
        """The weight as sampling would see it."""
        full, tensor = f"{PREFIX}{key}", self._tensors[key]
        if full in self._patcher.backup:  # patched in place at the moment: start from the original
            tensor = self._patcher.backup[full].weight
        if full not in self._patcher.patches:
            return tensor
        return comfy.lora.calculate_weight(self._patcher.patches[full], tensor.float().clone(), full).to(tensor.dtype)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return list(left) == list(right)
    return left == right


def describe_model(patcher: ModelPatcher) -> dict[str, Any] | None:
    """`describe` of the checkpoint behind a MODEL, with the backend of every layer; None for a 16-bit MODEL."""
    if not isinstance(patcher, SVDQuantPatcher):
        return None
    found = dict(patcher.attachments[ATTACHMENT])
    dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    backends, branches = {}, patcher.low_rank_patches()
    for key, module in patcher.packed_layers().items():
        choice = module.packed.choice(patcher.load_device, dtype)
        backends[layer_name(key)] = {
            "backend": choice.backend.name,
            "compute": choice.compute,
            "asked": module.packed.compute,
            "passed_over": choice.passed_over,
            "lora_rank": branches[key][0].shape[1] if key in branches else 0,
        }
    device, faster = patcher.load_device, _faster_format(found["formats"], patcher.load_device)
    return found | {"device": str(device), "dtype": str(dtype), "faster": faster, "backends": backends}


def _faster_format(formats: Iterable[str], device: torch.device) -> str | None:
    arch, _ = arch_of(device)
    return next((faster for format in formats if (faster := faster_format(format, arch))), None)
