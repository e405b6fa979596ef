"""Make a 4-bit model: plan, decide, make group after group, write. Resumable, one group of layers in memory."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...kernels.layer import LayerError, LayerSpec, is_finite
from ..calibration.file import Statistics
from ..calibration.tokens import InputStatistics
from ..files.checkpoint import Provenance, new_checkpoint
from ..files.dialects import native
from ..files.header import metadata_of
from ..files.integrity import bytes_of
from ..files.lifecycle import naming_a_full_disk
from ..files.part import PREFIX, Beside
from ..files.source import Source
from ..maths.layer import Dense, Making
from ..recipe import Recipe
from .decide import BudgetError, Decisions, decide
from .group import LayerGroup, LayerOutcome, make_group, quantize_layer
from .memory import PeakMemory
from .plan import QuantizeError, plan_layers, plan_model
from .work_folder import WorkFolder, digest

__all__ = [
    "BudgetError",
    "Progress",
    "QuantizeError",
    "QuantizeReport",
    "Target",
    "plan_layers",
    "quantize_layer",
    "quantize_model",
]

Progress = Callable[[int, int, str], None]
"""progress(done, total, layer): called before each layer; raise from it to stop, nothing is then left on disk but
the work folder, where one was asked for"""

WORK_VERSION = "3"  # raise it when the same recipe starts to give other bytes


@dataclass(frozen=True)
class Target:
    """Where the file goes.

    resume  keep finished layers beside `path` until the file is whole, and take up those of a stopped run
    beside  what makes it a whole checkpoint, or None
    """

    path: Path
    resume: bool = False
    beside: Beside | None = None

    @cached_property
    def work(self) -> WorkFolder | None:
        return WorkFolder.beside(self.path) if self.resume else None


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
    target: Target | str | Path,
    recipe: Recipe,
    progress: Progress | None = None,
    device: str = "cpu",
    statistics: Statistics | None = None,
) -> QuantizeReport:
    """Write a native checkpoint of `source`; the layers that read one activation are in memory together.

    target      a path stands for one that is not resumed
    statistics  of the same model; needed by every recipe but `fast`
    raises      QuantizeError for a model without a layer to quantize, with NaN or Inf, or already quantized;
                StatisticsError for statistics of another model; BudgetError; OSError when the disk is full; whatever
                `progress` raises. In every such case the file at `target` is as it was before.

        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from svdquant_pack.quantize.files.source import FileSource
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     wide, path = f"{folder}/wide.safetensors", f"{folder}/4bit.safetensors"
        ...     save_file({f"blocks.{i}.proj.weight": torch.randn(256, 128) for i in range(2)}, wide)
        ...     report = quantize_model(FileSource(wide), path, Recipe(rank=16))
        >>> report.family, list(report.errors), report.bytes_16bit, report.bytes_4bit
        ('generic', ['blocks.0.proj', 'blocks.1.proj'], 131072, 59904)
    """
    target = target if isinstance(target, Target) else Target(Path(target))
    with PeakMemory() as peak, target.work or contextlib.nullcontext():
        begun = time.perf_counter()
        plan = plan_model(source, recipe)
        decisions = decide(plan, source, recipe, statistics)
        reader, making = SourceReader(source), Making(recipe, plan.dtype, device)
        maker = GroupMaker(reader, decisions, statistics, making, target.work)
        with naming_a_full_disk(target.path, "; the finished layers are kept for it" if target.resume else ""):
            outcome = write(target, reader, decisions, recipe, maker.make_all(progress))
        WorkFolder.beside(target.path).clear() if target.work is None else target.work.clear()
        if progress is not None:
            progress(len(plan.specs), len(plan.specs), "")
    return replace(
        _report(target.path, outcome, recipe),
        seconds=time.perf_counter() - begun,
        peak_memory=peak.gpu_bytes or peak.bytes,
    )


class SourceReader:
    """Reads a source, refuses NaN and Inf, and remembers what it has read by one hash."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._digest = hashlib.sha256()

    def read(self, key: str) -> torch.Tensor:
        tensor = self.source.tensor(key)
        self._digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        self._digest.update(bytes_of(tensor))
        if tensor.is_floating_point() and not is_finite(tensor):
            raise QuantizeError(f"{self.source.name}: {key} holds NaN or Inf; repair or replace the source model")
        return tensor

    def read_layers(self, layers: Sequence[str]) -> dict[str, torch.Tensor]:
        """Weights, and the biases that there are, under their keys."""
        keys = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
        return {key: self.read(key) for key in keys if key in self.source.infos}

    def hash(self) -> str:
        return self._digest.hexdigest()


@dataclass(frozen=True)
class EightShare:
    """Which share of the multiply-adds has 8-bit activations, as it stands after the groups that are made already.

    A group whose error is larger than was predicted may join until `limit` is reached, so what becomes of it depends on
    the groups before it: of those that were given 8 bits, some ended in 16 bit and made room, others joined.

    products  layer -> multiply-adds per token, of all layers whose activations are rounded
    eight     the layers that have 8-bit activations
    """

    products: Mapping[str, int]
    limit: float
    eight: frozenset[str]

    @classmethod
    def before(cls, decisions: Decisions, limit: float) -> "EightShare":
        products = {layer: spec.n * spec.k for layer, spec in decisions.specs.items() if spec.fmt.low_rank}
        return cls(products, limit, frozenset(decisions.eight))

    def of(self, layers: Iterable[str]) -> float:
        return sum(self.products.get(layer, 0) for layer in layers) / max(1, sum(self.products.values()))

    def has_room_for(self, layers: Iterable[str]) -> bool:
        return self.of(layers) + self.of(self.eight) <= self.limit

    def after(self, records: Mapping[str, Mapping[str, Any]]) -> "EightShare":
        """With the layers of one more group as they came out."""
        eight = self.eight.difference(layer for layer, record in records.items() if "kept" in record)
        return replace(self, eight=eight.union(layer for layer, record in records.items() if "eight" in record))


@dataclass(frozen=True)
class GroupResult:
    """One group of layers as the file will hold it.

    records  of the layers that were made
    resumed  whether those were taken over from a stopped run
    """

    tensors: Mapping[str, torch.Tensor]
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    resumed: bool = False


@dataclass(frozen=True)
class GroupMaker:
    """Makes the groups of a plan one after the other: reads, makes or finds in the work folder, keeps there."""

    reader: SourceReader
    decisions: Decisions
    statistics: Statistics | None
    making: Making
    work: WorkFolder | None

    def make_all(self, progress: Progress | None) -> Iterator[GroupResult]:
        plan, done = self.decisions.plan, 0
        share = EightShare.before(self.decisions, self.making.recipe.act8_share)
        for group in plan.groups:
            for layer in group:
                if progress is not None:
                    progress(done, len(plan.specs), layer)
                done += 1
            result = self._make(group, share)
            share = share.after(result.records)
            yield result
            del result  # while the next one is made

    def _make(self, group: Sequence[str], share: EightShare) -> GroupResult:
        decisions, read = self.decisions, self.reader.read_layers(group)
        layers = [layer for layer in group if layer not in decisions.kept]
        kept = {key: tensor for key, tensor in read.items() if key.rpartition(".")[0] in decisions.kept}
        if not layers:
            return GroupResult(kept)
        inputs = None if self.statistics is None else self.statistics.of_group(group)
        key = "" if self.work is None else self._key(layers, read, inputs, share)
        found = None if self.work is None else self.work.find(key)
        if found is not None:
            return GroupResult(kept | found[0], found[1], resumed=True)
        try:
            task = LayerGroup(
                [Dense(read[f"{layer}.weight"], read.get(f"{layer}.bias"), decisions.specs[layer]) for layer in layers],
                inputs,
                [decisions.eight.get(layer) for layer in layers],
                share.has_room_for(layers),
                tuple(layers) in decisions.plan.shared,
            )
            outcomes = dict(zip(layers, make_group(task, self.making), strict=True))
        except LayerError as error:
            raise QuantizeError(f"{self.reader.source.name}: layer {', '.join(layers)}: {error}") from error
        tensors = {key: part for layer, outcome in outcomes.items() for key, part in _as_file(layer, outcome, read)}
        records = {layer: outcome.record for layer, outcome in outcomes.items()}
        if self.work is not None:
            self.work.keep(key, tensors, records)
        return GroupResult(kept | tensors, records)

    def _key(
        self,
        layers: Sequence[str],
        read: Mapping[str, torch.Tensor],
        inputs: InputStatistics | None,
        share: EightShare,
    ) -> str:
        """Everything that decides the bytes of these layers."""
        recipe, making = self.making.recipe, self.making
        used = f"{share.of(share.eight):.9f}"  # whether a large error may still be answered with 8-bit activations
        parts: list[str | torch.Tensor] = [WORK_VERSION, recipe.hash(), str(making.dtype), str(making.device), used]
        for layer in layers:
            parts += [layer, repr(self.decisions.specs[layer])]
            parts += [read[key] for key in (f"{layer}.weight", f"{layer}.bias") if key in read]
        if inputs is not None and recipe.needs_data:
            parts += [inputs.tokens, inputs.key, inputs.stratum, inputs.hold, inputs.absmax]
        return digest(parts)


def _as_file(name: str, outcome: LayerOutcome, read: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the file; a layer that stays in 16 bit as it was read"""
    if outcome.layer is None:
        yield from ((key, read[key]) for key in (f"{name}.weight", f"{name}.bias") if key in read)
        return
    yield from native.encode_layer(name, outcome.layer).items()
    if outcome.bias is not None:
        yield f"{name}.bias", outcome.bias


@dataclass(frozen=True)
class RunOutcome:
    """What came of all groups.

    records  of every layer that was made, those that then stayed in 16 bit included
    resumed  layers that were taken over from a stopped run
    """

    decisions: Decisions
    records: Mapping[str, Mapping[str, Any]]
    resumed: int

    @cached_property
    def kept(self) -> dict[str, str]:
        """layer -> why it stays in 16 bit"""
        found = {layer: record["kept"] for layer, record in self.records.items() if "kept" in record}
        return {**self.decisions.plan.unfit, **self.decisions.kept, **found}

    @cached_property
    def eight(self) -> dict[str, str]:
        """layer -> why it has 8-bit activations"""
        decided = {layer: reason for layer, reason in self.decisions.eight.items() if layer not in self.kept}
        return decided | {layer: record["eight"] for layer, record in self.records.items() if "eight" in record}

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The 4-bit layers of one input, without those that are alone with theirs."""
        found = (tuple(layer for layer in group if layer not in self.kept) for group in self.decisions.plan.groups)
        return tuple(group for group in found if len(group) > 1)

    @cached_property
    def specs(self) -> dict[str, LayerSpec]:
        """Of the 4-bit layers, as they are stored."""
        specs = {layer: spec for layer, spec in self.decisions.specs.items() if layer not in self.kept}
        return specs | {layer: replace(specs[layer], act_bits=8) for layer in self.eight}


def write(
    target: Target, reader: SourceReader, decisions: Decisions, recipe: Recipe, groups: Iterable[GroupResult]
) -> RunOutcome:
    """Everything into one file, which gets its name when it is whole; groups are asked for one by one."""
    source, beside, resumed = reader.source, target.beside, 0
    prefix = PREFIX if beside else ""
    records: dict[str, Mapping[str, Any]] = {}
    made = {f"{layer}.{part}" for layer in decisions.specs for part in ("weight", "bias")}
    others = [info for key, info in source.infos.items() if key not in made or key.endswith(".bias")]
    others += beside.infos.values() if beside else ()
    with new_checkpoint(target.path, decisions.specs.values(), others) as writer:
        for group in groups:
            # sorted: layers from the work folder come in another order
            for key in sorted(group.tensors):
                writer.add(f"{prefix}{key}", group.tensors[key])
            records |= group.records
            resumed += len(group.records) if group.resumed else 0
            del group  # while the next one is made
        for key in source.infos:
            if key not in made:
                writer.add(f"{prefix}{key}", reader.read(key))
        if beside:
            for key in beside.infos:
                writer.add(key, beside.read(key))
        outcome = RunOutcome(decisions, records, resumed)
        family = decisions.plan.family.name
        provenance = Provenance(
            family, source.unet_config, source.pinned, recipe.as_dict(), reader.hash(), outcome.groups
        )
        writer.metadata |= metadata_of(provenance, outcome.specs)
    return outcome


def _report(path: Path, outcome: RunOutcome, recipe: Recipe) -> QuantizeReport:
    notes, eight = list(outcome.decisions.notes), outcome.eight
    if eight:
        share = EightShare.before(outcome.decisions, recipe.act8_share).of(eight)
        notes.append(f"8-bit activations: {len(eight)} layers, {share:.1%} of the multiply-adds")
    made = {layer: record for layer, record in outcome.records.items() if "kept" not in record}
    size = sum(record["bytes"] for record in made.values())
    size_16bit = sum(outcome.specs[layer].bytes_16bit() for layer in made)
    if size >= size_16bit > 0:
        ranks = [outcome.specs[layer].rank for layer in made]
        notes.append(
            f"these layers take {size:,} bytes, and {size_16bit:,} in 16 bit: a branch of rank {max(ranks)} is too "
            "wide for layers of this size, choose a smaller rank"
        )
    return QuantizeReport(
        path,
        outcome.decisions.plan.family.name,
        {layer: record["weight_error"] for layer, record in made.items()},
        size,
        size_16bit,
        outcome.records,
        eight,
        outcome.kept,
        tuple(notes),
        outcome.resumed,
        recipe=recipe.as_dict(),
    )
