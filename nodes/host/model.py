"""Bridge: a checkpoint -> ComfyUI's own model with 4-bit layers in place, as a MODEL."""

import inspect
import logging
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

from ...kernels.dispatch import order_of
from ...kernels.first_use import FirstUse
from ...kernels.modes import MEASURED
from ...quantize.families import FAMILIES
from ...quantize.files.checkpoint import Checkpoint, CheckpointError
from ...quantize.files.describe import describe
from ...quantize.files.open import open_checkpoint
from ...quantize.files.source import FileSource
from ...quantize.files.tensor_file import TensorInfo
from ...quantize.model_config import ConfigError, Extent, check_config
from .describe import ATTACHMENT, FASTER, dtype_of, faster_format_of
from .guard import REFERENCE, Guard
from .linear import SVDQuantLinear, operations
from .measure import measure_layers
from .patcher import SVDQuantPatcher, adopt, layer_name
from .save import provenance_of, save_as_native

log = logging.getLogger("svdquant")
COMPLAINTS = (
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AssertionError,
    AttributeError,
    RuntimeError,
)  # of a host
# modules of LTX-2 that the host also reads from text encoder files
ELSEWHERE = ("audio_embeddings_connector.", "video_embeddings_connector.")


def load_model(
    path: str, compute: str = "auto", if_not_finite: str = REFERENCE, disable_dynamic: bool = False
) -> ModelPatcher:
    """ComfyUI's own model of a 4-bit checkpoint, as a MODEL.

    The host finds the architecture from names and shapes; only what the file pins is taken from its header.
    if_not_finite  what a Guard does about NaN and Inf

    raises  CheckpointError naming file, layer and reason
    """
    guard = Guard(if_not_finite)
    checkpoint = open_checkpoint(path)
    checkpoint.check_compute(compute)
    state_dict = {name: checkpoint.tensor(name) for name in checkpoint.rest}
    for name, spec in checkpoint.specs.items():  # stand-ins without memory: detection and LoRA names look at them
        state_dict[f"{name}.weight"] = torch.empty(spec.n, spec.k, dtype=checkpoint.dtype, device="meta")
    provenance, pinned = checkpoint.provenance, pinned_config(checkpoint)
    missing: list[list[str]] = []
    first_use = FirstUse(comfy.model_management.get_torch_device(), compute)
    options = {"custom_operations": _watching(operations(checkpoint, compute), missing, first_use)}
    try:
        bare = _build(checkpoint.path.name, state_dict, options, pinned, disable_dynamic)
    except BaseException:
        first_use.stop()
        raise
    if bare is None:
        first_use.stop()
        raise CheckpointError(
            f"{checkpoint.path.name}: this ComfyUI does not know a model with these layers "
            f"(family {provenance.family}); a newer ComfyUI may"
        )
    patcher = adopt(bare)
    patcher.model.svdquant.path = checkpoint.path
    patcher.model.svdquant.provenance = provenance_of(provenance, patcher.model)
    save_as_native(patcher.model)
    patcher.model.svdquant.first_use = first_use
    weakref.finalize(patcher.model, first_use.stop)
    for module in patcher.model.diffusion_model.modules():
        if isinstance(module, SVDQuantLinear):
            module.__class__ = SVDQuantLinear  # those that load are of this file, hold it open, and cannot be pickled
    parameters = dict(patcher.model.diffusion_model.named_parameters())
    lost = [name for names in missing for name in names if name in parameters and not name.startswith(ELSEWHERE)]
    for name in FAMILIES[provenance.family].unread if provenance.family in FAMILIES else ():
        if name in lost:
            torch.nn.init.ones_(parameters[name])
            lost.remove(name)
    _refuse_missing(checkpoint.path.name, lost)
    unused = checkpoint.specs.keys() - set(map(layer_name, patcher.packed_layers()))
    if unused:
        raise CheckpointError(
            f"{checkpoint.path.name}: {len(unused)} 4-bit layers have no place in the model that ComfyUI built, "
            f"first {min(unused)!r}"
        )
    if compute == MEASURED:
        measure_layers(patcher, dtype_of(patcher))
    _arrange(patcher)
    for module in patcher.packed_layers().values():  # the type of the activations is known for certain now
        first_use.add(*module.kind(), dtype_of(patcher))
    first_use.close()
    file = describe(checkpoint)
    patcher.set_attachments(ATTACHMENT, file)
    for note in checkpoint.notes:
        log.info("%s: %s", checkpoint.path.name, note)
    if faster := faster_format_of(file["formats"], patcher.load_device):
        log.info("%s: %s", file["file"], FASTER.format(faster))
    guard.watch(patcher)
    patcher.cached_patcher_init = (
        load_model,
        (path, compute, if_not_finite),
    )  # newer hosts rebuild the model from this
    return patcher


def _arrange(patcher: SVDQuantPatcher) -> None:
    """Put every layer's bytes in the order that this model's device reads fastest: once, wherever they will lie."""
    device, dtype = patcher.load_device, dtype_of(patcher)
    for module in patcher.packed_layers().values():
        packed = module.four_bit
        module.arrange(order_of(packed.spec, device, dtype, packed.compute), device)


def load_pinned_model(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    """A 16-bit file whose metadata holds the model configuration (`config`, JSON), as a MODEL."""
    source = FileSource(path)
    _check_config(source.name, source.unet_config, source.infos, source.family)
    state_dict = {name: source.tensor(name) for name in source.infos}
    patcher = _build(source.name, state_dict, {}, source.unet_config, disable_dynamic)
    if patcher is None:
        raise CheckpointError(f"{source.name}: this ComfyUI does not know a model with these layers")
    patcher.cached_patcher_init = (load_pinned_model, (path,))  # as above
    return patcher


def pinned_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the file pins of the host's configuration. Raises CheckpointError for what no file may say."""
    known = checkpoint.provenance
    pinned = {key: known.unet_config[key] for key in known.pinned if key in known.unet_config}
    _check_config(checkpoint.path.name, pinned, checkpoint.weight_infos(), known.family)
    return pinned


def _check_config(file: str, pinned: Mapping[str, Any], infos: Mapping[str, TensorInfo], family: str | None) -> None:
    """Raise CheckpointError for what no file may say of the host's model, before anything is built."""
    more = FAMILIES[family].config if family in FAMILIES else {}
    try:
        check_config(pinned, Extent(infos, [info.shape for info in infos.values()]), more)
    except ConfigError as error:
        raise CheckpointError(
            f"{file}: {error}. The header was edited, or a newer version of this pack may know it"
        ) from error


def _watching(base: Any, missing: list[list[str]], first_use: FirstUse) -> type:
    """The same operations; into `missing` goes torch's list of what the model wants and was not given.

    The host only logs it. One list serves a whole load, and grows until the load ends. `first_use` is told of every
    4-bit layer, with the type that the host will most likely compute in.
    """
    device = first_use.device

    class Linear(base.Linear):  # type: ignore[misc]
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args: Any) -> None:
            missing[:], dtype = [missing_keys], self.weight.dtype
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
            if self.packed is not None:
                dtype = comfy.model_management.unet_manual_cast(dtype, device) or dtype
                spec, kinds, biased = self.kind()
                first_use.add(spec, kinds, biased, dtype)

    return type(base.__name__, (base,), {"Linear": Linear})


def _refuse_missing(file: str, lost: list[str]) -> None:
    """Raise CheckpointError for parameters that are not in the file: they would be zeros, or whatever memory held.

    Buffers are the host's own: it computes those that files leave out.
    """
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise CheckpointError(
            f"{file}: the model needs {', '.join(map(repr, lost[:3]))}{more}, and the file does not have "
            f"{'it' if len(lost) == 1 else 'them'}. It is incomplete: download it again, or make it again"
        )


def _build(
    file: str,
    state_dict: dict[str, torch.Tensor],
    options: dict[str, Any],
    pinned: Mapping[str, Any],
    disable_dynamic: bool,
) -> ModelPatcher | None:
    """What the host makes of the tensors and of what is pinned."""
    load = pinned_loader(comfy.sd.load_diffusion_model_state_dict, file, pinned, disable_dynamic)
    return load(state_dict, model_options=options)


def pinned_loader(
    load: Callable[..., Any], file: str, pinned: Mapping[str, Any], disable_dynamic: bool
) -> Callable[..., Any]:
    """One of the host's loaders of tensors, told what is pinned; its complaint becomes a CheckpointError."""
    keywords = {"disable_dynamic": disable_dynamic} if "disable_dynamic" in inspect.signature(load).parameters else {}
    if pinned:
        assert isinstance(load, types.FunctionType)
        load = _with_pinned_detection(load, pinned)

    def told(state_dict: dict[str, torch.Tensor], **arguments: Any) -> Any:
        try:
            return load(state_dict, **arguments, **keywords)
        except COMPLAINTS as error:
            other_runtime_error = isinstance(error, RuntimeError) and "state_dict" not in str(error)  # of memory, say
            if isinstance(error, CheckpointError) or other_runtime_error:
                raise
            said = ", ".join(f"{key} {value!r:.40}" for key, value in pinned.items())
            what = (
                f"cannot build a model as the header of the file says, with {said}"
                if pinned
                else "cannot build a model of these tensors, and the file says nothing of the model's configuration"
            )
            raise CheckpointError(f"{file}: ComfyUI {what}: {error}") from error

    return told


def _with_pinned_detection(load: types.FunctionType, pinned: Mapping[str, Any]) -> types.FunctionType:
    """The host's loader, with its own detection overridden by `pinned`.

    The loader has no argument for it, and replacing the host's function for a moment would be seen by every other
    pack. So this is the loader's code with another `model_detection` among its globals: a function looks names up in
    the dict that it was made with, so a second function of the same code and another dict sees the replacement, and
    the host's own keeps its own. Whatever else the loader does, in any version of the host, it does here as well.
    """

    class PinnedDetection:
        def __getattr__(self, name: str) -> Any:
            return getattr(comfy.model_detection, name)

        @staticmethod
        def model_config_from_unet(state_dict, prefix, *args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            config = comfy.model_detection.detect_unet_config(state_dict, prefix, metadata=metadata) or {}
            return comfy.model_detection.model_config_from_unet_config({**config, **pinned}, state_dict)

    scope = {**load.__globals__, "model_detection": PinnedDetection()}
    copy = types.FunctionType(load.__code__, scope, load.__name__, load.__defaults__, load.__closure__)
    copy.__kwdefaults__ = load.__kwdefaults__
    return copy
