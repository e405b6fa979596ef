"""Make a 4-bit model: layer after layer, resumable, one group of layers in memory."""

import errno
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...kernels.layer import Layer, LayerSpec
from ..calibration.file import Statistics, StatisticsError
from ..calibration.tokens import Entry
from ..families import FAMILIES, detect
from ..files.checkpoint import Provenance
from ..files.dialects import native
from ..files.source import Source
from ..files.tensor_file import TensorWriter
from ..recipe import Recipe
from .layer import QuantizedLayer, quantize_group, quantize_layer
from .memory import PeakMemory
from .plan import group_layers, plan_layers
from .ranks import choose_ranks
from .work_folder import WorkFolder, digest

__all__ = ["Progress", "QuantizeError", "QuantizeReport", "plan_layers", "quantize_layer", "quantize_model"]

Progress = Callable[[int, int, str], None]
"""progress(done, total, layer): called before each layer; raise from it to stop, nothing is then left on disk but
the work folder, where one was asked for"""

HESSIAN_STEP = 64  # a block of a Hessian holds whole groups of either format
DISK_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
WORK_VERSION = "2"  # raise it when the same recipe starts to give other bytes


class QuantizeError(ValueError):
    """A model cannot be quantized. The message names the layer."""


@dataclass(frozen=True)
class QuantizeReport:
    """What a run did: family, weight error per layer, bytes of the 4-bit layers and of the same weights in 16 bit.

    layers   layer -> record: shape, rank, output errors on held-out tokens, what was chosen, seconds
    eight    layer -> why its activations have 8 bit
    kept     layer -> why it stayed in 16 bit
    notes    sentences about the run as a whole
    resumed  layers that an earlier, stopped run had finished
    """

    path: Path
    family: str
    errors: Mapping[str, float]
    bytes_4bit: int
    bytes_16bit: int
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    eight: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    resumed: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)


def quantize_model(
    source: Source,
    path: str | Path,
    recipe: Recipe,
    progress: Progress | None = None,
    device: str = "cpu",
    statistics: Statistics | None = None,
    resume: bool = False,
) -> QuantizeReport:
    """Write a native checkpoint of `source` to `path`; the layers that read one activation are in memory together.

    statistics  of the same model; needed by every recipe but `fast`
    resume      keep finished layers beside `path` until the file is whole, and take up those of a stopped run
    raises      QuantizeError for a model without a layer to quantize, with NaN or Inf, or already quantized;
                StatisticsError for statistics of another model; BudgetError; OSError when the disk is full; whatever
                `progress` raises. In every such case `path` is as it was before.
    """
    with PeakMemory() as peak:
        begun = time.perf_counter()
        run = _Run(source, Path(path), recipe, progress or _silent, device, statistics, resume)
        try:
            run.write()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            kept = "; the finished layers are kept for it" if resume else ""
            where = f"while {run.path.name} was written to {run.path.parent}"
            raise OSError(error.errno, f"{error.strerror} {where}: make room there and run again{kept}") from error
    return replace(run.report(), seconds=time.perf_counter() - begun, peak_memory=peak.gpu_bytes or peak.bytes)


def _silent(done: int, total: int, layer: str) -> None:
    pass


class _Run:
    """One run of `quantize_model`: its plan, and what it has found out so far."""

    def __init__(
        self,
        source: Source,
        path: Path,
        recipe: Recipe,
        progress: Progress,
        device: str,
        statistics: Statistics | None,
        resume: bool,
    ) -> None:
        self.source, self.path, self.recipe, self.device = source, path, recipe, device
        self.progress, self.statistics = progress, statistics
        self.family = detect(source.infos) if source.family is None else FAMILIES[source.family]
        unfit: dict[str, str] = {}
        specs = plan_layers(source.infos, self.family, recipe, unfit)
        if not specs:
            raise QuantizeError(f"{source.name}: no linear layer of family {self.family.name} can become 4-bit")
        self.groups = group_layers(specs, self.family)
        self._check_statistics(specs)
        self.dtype = _stored_dtype(source.infos[f"{layer}.weight"].dtype for layer in specs)
        self.work = WorkFolder.beside(path) if resume else None
        chosen = choose_ranks(source, specs, self.groups, recipe, statistics)
        self.specs, self.kept, self.eight, self.notes = chosen.specs, unfit | chosen.kept, chosen.eight, chosen.notes
        self.digest = hashlib.sha256()
        self.records: dict[str, dict[str, Any]] = {}
        self.size = self.resumed = 0

    def _check_statistics(self, specs: Mapping[str, LayerSpec]) -> None:
        if self.statistics is None:
            if self.recipe.needs_data:
                raise QuantizeError(
                    f"recipe {self.recipe.name} needs statistics: run SVDQuant Calibrate with this model, or use fast"
                )
            return
        found = 0
        for group in self.groups:
            entry = self._entry(group)
            if entry is None:
                continue
            found += 1
            wanted, width = specs[group[0]].k, entry.tokens.shape[1]
            if width != wanted:
                raise StatisticsError(
                    f"{self.statistics.path.name}: {group[0]} has {width} input channels there and {wanted} in "
                    f"{self.source.name}: these are statistics of another model"
                )
        if not found:
            raise StatisticsError(
                f"{self.statistics.path.name}: holds none of the layers of {self.source.name}: statistics of another "
                "model"
            )

    def _entry(self, group: Sequence[str]) -> Entry | None:
        if self.statistics is None:
            return None
        return next((entry for layer in group if (entry := self.statistics.entry(layer)) is not None), None)

    def write(self) -> None:
        """Everything into one file, which gets its name when it is whole."""
        done, total = 0, sum(map(len, self.groups))
        made = {f"{layer}.{part}" for layer in self.specs for part in ("weight", "bias")}
        with TensorWriter(self.path, {}, extra=16 * total + len(self.source.infos)) as writer:
            for group in self.groups:
                for layer in group:
                    self.progress(done, total, layer)
                    done += 1
                # sorted: layers from the work folder come in another order
                for key, tensor in sorted(self._group(group).items()):
                    writer.add(key, tensor)
            for key in self.source.infos:
                if key not in made:
                    writer.add(key, self._read(key))
            specs = {layer: spec for layer, spec in self.specs.items() if layer not in self.kept}
            provenance = Provenance(
                self.family.name,
                self.source.unet_config,
                self.source.pinned,
                self.recipe.as_dict(),
                self.digest.hexdigest(),
            )
            writer.metadata |= native.metadata_of(provenance, specs)
        if self.work is not None:
            self.work.clear()
        self.progress(total, total, "")

    def _group(self, group: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors of the file for one group of layers: made, or found in the work folder."""
        keys = [key for layer in group for key in (f"{layer}.weight", f"{layer}.bias") if key in self.source.infos]
        read = {key: self._read(key) for key in keys}
        layers = [layer for layer in group if layer not in self.kept]
        tensors = {key: read[key] for key in keys if key.rpartition(".")[0] in self.kept}
        if not layers:
            return tensors
        entry = self._entry(group)
        key = self._key(layers, read, entry) if self.work is not None else ""
        found = self.work.find(key) if self.work is not None else None
        if found is None:
            weights = [read[f"{layer}.weight"].to(self.device) for layer in layers]
            biases = [read[f"{layer}.bias"].to(self.device) if f"{layer}.bias" in read else None for layer in layers]
            specs = [self.specs[layer] for layer in layers]
            made = self._make(weights, biases, specs, entry)
            eight = self._eight_after(layers, made)
            if eight:
                specs = [replace(spec, act_bits=8) for spec in specs]
                made = self._make(weights, biases, specs, entry)
            found = self._encode(layers, made, read, eight)
            if self.work is not None:
                self.work.keep(key, *found)
        else:
            self.resumed += len(layers)
        new, records = found
        for layer, record in records.items():
            self.records[layer] = record
            if "kept" in record:
                self.kept[layer] = record["kept"]
                self.eight.pop(layer, None)
                continue
            self.size += record["bytes"]
            if "eight" in record:
                self.eight[layer] = record["eight"]
                self.specs[layer] = replace(self.specs[layer], act_bits=8)
        return tensors | new

    def _make(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        specs: Sequence[LayerSpec],
        entry: Entry | None,
    ) -> list[QuantizedLayer]:
        """One group of layers; with a Hessian of smaller blocks where memory does not suffice, as the record says"""
        recipe = self.recipe
        while True:
            try:
                return quantize_group(weights, biases, specs, recipe, self.dtype, entry)
            except (RuntimeError, MemoryError) as error:
                half = min(recipe.hessian_block, specs[0].k) // 2 // HESSIAN_STEP * HESSIAN_STEP
                if half == 0 or not recipe.needs_data or not _is_out_of_memory(error):
                    raise
                recipe = replace(recipe, hessian_block=half)

    def _eight_after(self, layers: Sequence[str], made: Sequence[QuantizedLayer]) -> dict[str, str]:
        """layer -> why the group is made again with 8-bit activations: an error was larger than was predicted"""
        limit, specs = self.recipe.fallback, [self.specs[layer] for layer in layers]
        errors = [one.record.get("output_error", 0.0) for one in made]
        if not limit or max(errors) <= limit or specs[0].act_bits == 8:
            return {}
        if self._share(layers) + self._share(self.eight) > self.recipe.act8_share:
            return {}
        return {
            layer: f"output error {error:.3f} is above {limit:g}" if error > limit else "its group's error is too large"
            for layer, error in zip(layers, errors, strict=True)
        }

    def _share(self, layers: Iterable[str]) -> float:
        """Of the multiply-adds of all layers whose activations are rounded."""
        products = {layer: spec.n * spec.k for layer, spec in self.specs.items() if spec.fmt.low_rank}
        return sum(products[layer] for layer in layers) / sum(products.values())

    def _encode(
        self,
        layers: Sequence[str],
        made: Sequence[QuantizedLayer],
        read: Mapping[str, torch.Tensor],
        eight: Mapping[str, str],
    ) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
        """(tensors of the file, records); a layer whose measured error is too large comes out as it went in"""
        tensors: dict[str, torch.Tensor] = {}
        records: dict[str, dict[str, Any]] = {}
        for layer, one in zip(layers, made, strict=True):
            spec, limit = one.layer.spec, self.recipe.fallback
            record = {
                "format": spec.format,
                "shape": [spec.n, spec.k],
                "rank": spec.rank,
                "act_bits": spec.act_bits if spec.fmt.low_rank else 16,
                "bytes": one.layer.nbytes(),
                "weight_error": one.error,
                **one.record,
            }
            measured = record.get("output_error", 0.0)
            # with a target size every byte is spent already, and the budget has decided what stays in 16 bit
            if limit and measured > limit and not self.recipe.target_size:
                even = ", with 8-bit activations too" if spec.act_bits == 8 else ""
                record["kept"] = f"output error {measured:.3f} is above {limit:g}{even}"
                tensors |= {key: read[key] for key in (f"{layer}.weight", f"{layer}.bias") if key in read}
            else:
                tensors |= _as_file(layer, one.layer, one.bias, self.dtype)
                if spec.act_bits == 8:
                    record["eight"] = eight.get(layer) or self.eight[layer]
            records[layer] = record
        return tensors, records

    def _key(self, layers: Sequence[str], read: Mapping[str, torch.Tensor], entry: Entry | None) -> str:
        """Everything that decides the bytes of these layers."""
        used = f"{self._share(self.eight):.9f}"  # whether a large error may still be answered with 8-bit activations
        parts: list[str | torch.Tensor] = [WORK_VERSION, self.recipe.hash(), str(self.dtype), self.device, used]
        for layer in layers:
            parts += [layer, repr(self.specs[layer])]
            parts += [read[key] for key in (f"{layer}.weight", f"{layer}.bias") if key in read]
        if entry is not None and self.recipe.needs_data:
            parts += [entry.tokens, entry.key, entry.stratum, entry.hold, entry.absmax]
        return digest(parts)

    def _read(self, key: str) -> torch.Tensor:
        tensor = self.source.tensor(key)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        self.digest.update(memoryview(raw.numpy()))
        if tensor.is_floating_point() and not (tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all():
            raise QuantizeError(f"{self.source.name}: {key} holds NaN or Inf; repair or replace the source model")
        return tensor

    def report(self) -> QuantizeReport:
        layers = {layer: record for layer, record in self.records.items() if "kept" not in record}
        notes = list(self.notes)
        if self.eight:
            share = f"{self._share(self.eight):.1%} of the multiply-adds"
            notes.append(f"8-bit activations: {len(self.eight)} layers, {share}")
        return QuantizeReport(
            self.path,
            self.family.name,
            {layer: record["weight_error"] for layer, record in layers.items()},
            self.size,
            sum(self.specs[layer].bytes_16bit() for layer in layers),
            self.records,
            self.eight,
            self.kept,
            tuple(notes),
            self.resumed,
            recipe=self.recipe.as_dict(),
        )


def _is_out_of_memory(error: BaseException) -> bool:
    """torch has a class of its own for GPUs only."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _as_file(name: str, layer: Layer, bias: torch.Tensor | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {key: tensor.cpu() for key, tensor in native.encode_layer(name, layer).items()}
    return tensors if bias is None else {**tensors, f"{name}.bias": bias.to("cpu", dtype)}


def _stored_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """fp16 stays fp16; everything else is stored as bf16, whose range no weight overflows."""
    return torch.float16 if set(dtypes) == {torch.float16} else torch.bfloat16
