"""Bridge: a 4-bit MODEL with its active LoRAs -> a native checkpoint that has them inside."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.lora
import torch

from ...kernels.layer import Layer
from ...quantize.calibration.file import Statistics, StatisticsError
from ...quantize.files.checkpoint import Provenance
from ...quantize.files.dialects import native
from ...quantize.files.header import metadata_of
from ...quantize.files.lifecycle import naming_a_full_disk
from ...quantize.files.tensor_file import TensorInfo, TensorWriter
from ...quantize.lora.bake import BakedLayer, bake_layer
from ...quantize.lora.deltas import LoraError
from .linear import SVDQuantLinear
from .patcher import PREFIX, SVDQuantPatcher, layer_name
from .save import stored_dtype

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class BakeReport:
    """What was written: layers with LoRAs inside, the largest lost share, layers that had to become 16-bit."""

    path: Path
    layers: int
    lost: float
    dense: tuple[str, ...]


def bake(
    patcher: SVDQuantPatcher,
    path: str | Path,
    refit: bool = False,
    progress: Progress | None = None,
    statistics: Statistics | None = None,
) -> BakeReport:
    """Write `patcher` with everything that is patched into it, layer by layer.

    refit   keep the rank of every layer: the best branch of that rank is stored, and what it misses reported
    statistics  of the model, to refit by; layers that it lacks are refitted without
    raises  LoraError for a patch that no low-rank branch can hold, and what `progress` raises; `path` is then as before
    """
    baked = _bake_layers(patcher, refit, progress, statistics)
    packed = {layer_name(key): module for key, module in patcher.packed_layers().items()}
    dense = {name: entry.weight for name, entry in baked.items() if entry.weight is not None}

    def layer_of(name: str) -> Layer:
        taken = baked[name].layer if name in baked else None
        return taken or packed[name].four_bit.layer(packed[name].blob.detach())

    specs = {name: layer_of(name).spec for name in packed if name not in dense}
    dtype = stored_dtype(patcher.packed_layers())
    rest = _rest(patcher, packed, dtype)
    plan = {name: TensorInfo.of(tensor) for name, tensor in rest.items()}
    plan |= {
        f"{name}.weight": TensorInfo((packed[name].out_features, packed[name].in_features), dtype) for name in dense
    }
    for name in specs:
        plan |= {key: TensorInfo.of(tensor) for key, tensor in native.encode_layer(name, layer_of(name)).items()}
    with naming_a_full_disk(Path(path)), TensorWriter(path, plan) as writer:
        for name in specs:
            for key, tensor in native.encode_layer(name, layer_of(name)).items():
                writer.write(key, tensor)
        for name, weight in dense.items():
            writer.write(f"{name}.weight", weight.to(dtype))
        for key, tensor in rest.items():
            writer.write(key, tensor)
        writer.metadata |= metadata_of(_provenance(patcher, refit), specs)
    lost = max((entry.lost for entry in baked.values()), default=0.0)
    return BakeReport(Path(path), len(baked), lost, tuple(dense))


def _bake_layers(
    patcher: SVDQuantPatcher, refit: bool, progress: Progress | None, statistics: Statistics | None
) -> dict[str, BakedLayer]:
    everything = patcher.layer_loras()
    baked: dict[str, BakedLayer] = {}
    for done, (key, loras) in enumerate(everything.items()):
        name, module = layer_name(key), patcher.packed_layers()[key]
        if progress is not None:
            progress(done, len(everything), name)
        layer = module.four_bit.layer(module.blob.detach().cpu())
        rank = layer.spec.rank if refit and layer.spec.rank else None
        entry = None
        if statistics is not None and rank is not None:
            entry = statistics.entry(name)
            if entry is not None and entry.tokens.shape[1] != layer.spec.k:
                raise StatisticsError(
                    f"{statistics.path.name}: layer {name!r} has {entry.tokens.shape[1]} channels, this model's has "
                    f"{layer.spec.k}: they are statistics of another model"
                )
        try:
            baked[name] = bake_layer(layer, loras, rank, patcher.lora_limits(), patcher.load_device, entry)
        except LoraError as error:
            raise LoraError(f"{name}: {error}") from error
    return baked


def _rest(patcher: SVDQuantPatcher, packed: dict[str, SVDQuantLinear], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor that is no part of a 4-bit layer, as sampling sees it; 16-bit wherever that loses nothing."""
    rest = {}
    everything = patcher.model.state_dict()
    for name, tensor in ((key.removeprefix(PREFIX), everything[key]) for key in everything if key.startswith(PREFIX)):
        layer, _, suffix = name.rpartition(".")
        if layer in packed and suffix != "bias":
            continue
        full = f"{PREFIX}{name}"
        if full in patcher.backup:  # patched in place at the moment: start from the original
            tensor = patcher.backup[full].weight
        patches = patcher.patches.get(full)
        if patches:
            tensor = comfy.lora.calculate_weight(patches, tensor.float().clone(), full)
        narrow = tensor.to(dtype) if tensor.is_floating_point() else tensor
        rest[name] = narrow if patches or torch.equal(narrow.to(tensor.dtype), tensor) else tensor
    return rest


def _provenance(patcher: SVDQuantPatcher, refit: bool) -> Provenance:
    known = patcher.model.svdquant.provenance
    recipe = {**known.recipe, "baked_loras": sum(bool(group.keys) for group in patcher.svdquant_groups), "refit": refit}
    return replace(known, recipe=recipe)
