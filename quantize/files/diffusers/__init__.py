"""Diffusers' names of 16-bit models as ComfyUI's. TABLES is what lies in this folder, one model family per file.

A rule says which stored modules, one after the other along their outputs, are one module of ComfyUI. `#` stands for a
number, the same in both names. Tensors keep their last part (`.weight`, `.bias`); a rule may name a whole tensor too.
Source of every table: the names of Diffusers' classes, recorded in tests/golden/diffusers_names.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ....kernels.discover import modules
from ...families import FAMILIES, FamilyError, pattern
from ..dialects.nunchaku.tables import NameMap
from ..tensor_file import TensorFile, TensorFileError, TensorInfo
from ..tensors import TensorView

# names of models and text encoders that no ComfyUI reads as they are
FOREIGN = (
    "{single,joint}_transformer_blocks.#.attn.to_q.weight",
    "down_blocks.#.resnets.#.conv1.weight",
    "blocks.#.attn1.to_out.0.weight",
    "{condition_embedder.time_embedder,time_embed.t_embedder,time_embed.timestep_embedder}.linear_1.weight",
    "{time_extra_emb.timestep_embedder,adaln_single.emb.timestep_embedder,time_embedding}.linear_1.weight",
    "model.layers.#.self_attn.q_proj.weight",
    "encoder.block.#.layer.#.SelfAttention.q.weight",
    "blk.#.attn_q.weight",
)


@dataclass(frozen=True)
class Rule:
    """host  <- stored: modules or tensors, `#` for numbers

    swap  (scale, shift) there, (shift, scale) in ComfyUI: halves of the outputs change places, where a module makes
          two numbers for each of its inputs
    """

    host: str
    stored: tuple[str, ...]
    swap: bool = False


@dataclass(frozen=True)
class NameTable:
    """One family: `markers` must all match a tensor's name, `absent` none (patterns as in families)."""

    name: str
    markers: tuple[str, ...]
    rules: tuple[Rule, ...]
    absent: tuple[str, ...] = ()

    def is_of(self, keys: Iterable[str]) -> bool:
        keys = list(keys)

        def found(marker: str) -> bool:
            return any(map(pattern(marker).fullmatch, keys))

        return all(map(found, self.markers)) and not any(map(found, self.absent))


def rules(stored: str, host: str, table: Mapping[str, str | Sequence[str]], swap: bool = False) -> tuple[Rule, ...]:
    """Rules below two prefixes: {name in ComfyUI: name stored, or several that are joined}.

    >>> rules("transformer_blocks.#.", "blocks.#.", {"qkv": ("to_q", "to_k")})
    (Rule(host='blocks.#.qkv', stored=('transformer_blocks.#.to_q', 'transformer_blocks.#.to_k'), swap=False),)
    """
    parts = {name: (found,) if isinstance(found, str) else tuple(found) for name, found in table.items()}
    return tuple(Rule(host + name, tuple(stored + part for part in found), swap) for name, found in parts.items())


def rules_of(names: NameMap) -> tuple[Rule, ...]:
    """The rules in the table of a Nunchaku family: what Nunchaku leaves in 16 bit has Diffusers' names."""
    found = []
    for block in names.blocks:
        stored, host = (f"{prefix}." if prefix else "" for prefix in (block.stored, block.host))
        for row in block.linears:
            parts = tuple(stored + part.name for part in row.lite or row.stored)
            hosts = tuple(host + name for name in row.host)
            pairs = zip(hosts, ((part,) for part in parts), strict=True) if len(hosts) > 1 else [(hosts[0], parts)]
            found += [Rule(name, part, row.swap) for name, part in pairs]
        for name, spellings in {**block.tensors, **block.optional_tensors}.items():
            found += [Rule(host + name, (stored + spelling,)) for spelling in spellings]
    return tuple(found)


def host_names(file: TensorFile) -> TensorFile:
    """A model in Diffusers' names under ComfyUI's, joined where ComfyUI has one tensor; any other model as it is.

    raises  TensorFileError for a tensor that has no place, and for one of several joined that is missing
    """
    table = next((table for table in TABLES.values() if table.is_of(file)), None)
    if table is None:
        return file
    found: dict[str, dict[int, str]] = defaultdict(dict)  # ComfyUI's name -> {place among the joined: stored name}
    rule_of: dict[str, Rule] = {}
    for key in file:
        place = next(_places(table, key), None)
        if place is None:
            raise TensorFileError(
                f"{file.path.name}: {key} has no place in {table.name}, whose Diffusers names the model has. It is a "
                "variant that is not known here: load it in ComfyUI and connect the MODEL instead of the file"
            )
        host, rule, index = place
        found[host][index], rule_of[host] = key, rule
    parts = {host: [places[i] for i in sorted(places)] for host, places in found.items()}
    for host, stored in parts.items():
        if len(stored) != len(rule_of[host].stored):
            missing = next(name for i, name in enumerate(rule_of[host].stored) if i not in found[host])
            raise TensorFileError(
                f"{file.path.name}: {host} is made of {len(rule_of[host].stored)} tensors, and that of {missing} is "
                "missing. The file is not whole: download it again"
            )
    infos = {host: _joined_info(file, host, stored) for host, stored in parts.items()}

    def read(host: str) -> torch.Tensor:
        tensors = [file.read(name) for name in parts[host]]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        halves = rule_of[host].swap and _makes_two(infos, host)
        return torch.cat(whole.chunk(2)[::-1]) if halves else whole

    return TensorView(file.path, infos, read, file.metadata)


def _places(table: NameTable, key: str) -> Iterator[tuple[str, Rule, int]]:
    """(ComfyUI's name, rule, place among the joined): of the whole name, else of the module's with its last part"""
    module, _, suffix = key.rpartition(".")
    for name, end in ((key, ""), (module, f".{suffix}")):
        by_end, last = _expressions(table.rules), name.rpartition(".")[2]
        for expression, rule, index in (*by_end.get(last, ()), *by_end.get("#", ())):
            if match := expression.fullmatch(name):
                numbers = iter(match.groups())
                yield re.sub("#", lambda _: next(numbers), rule.host) + end, rule, index  # noqa: B023 - used at once


@cache
def _expressions(table: tuple[Rule, ...]) -> Mapping[str, list[tuple[re.Pattern[str], Rule, int]]]:
    """By their last part: a UNet has a thousand of them, and two thousand tensors"""
    found: dict[str, list[tuple[re.Pattern[str], Rule, int]]] = defaultdict(list)
    for rule in table:
        for index, part in enumerate(rule.stored):
            found[part.rpartition(".")[2]].append((pattern(part), rule, index))
    return dict(found)


def _joined_info(file: TensorFile, host: str, stored: list[str]) -> TensorInfo:
    infos = [file.infos[name] for name in stored]
    first = infos[0]
    if len({(info.dtype, info.shape[1:]) for info in infos}) > 1 or not first.shape:
        said = ", ".join(f"{info.dtype} {info.shape}" for info in infos)
        raise TensorFileError(f"{file.path.name}: {host} is made of {', '.join(stored)}, which do not join ({said})")
    return TensorInfo((sum(info.shape[0] for info in infos), *first.shape[1:]), first.dtype)


def _makes_two(infos: Mapping[str, TensorInfo], host: str) -> bool:
    weight = infos.get(f"{host.rpartition('.')[0]}.weight")
    return weight is not None and len(weight.shape) == 2 and weight.shape[0] == 2 * weight.shape[1]


def refuse_foreign(file: TensorFile) -> None:
    """Raise FamilyError for the names of another program, of a model that no table here knows."""
    known = any(family.markers and family.detect(file) for family in FAMILIES.values())
    mark = next((key for key in file for mark in FOREIGN if pattern(mark).fullmatch(key)), None)
    if mark is not None and not known:
        raise FamilyError(
            f"{file.path.name}: {mark} is a name that ComfyUI's models do not have, of a model that no table here "
            "knows: what is made of it could not be loaded. Load it in ComfyUI, connect the MODEL to SVDQuant Quantize "
            "Model and choose (model input), or take a file that ComfyUI's own loader opens"
        )


TABLES: dict[str, NameTable] = {module.TABLE.name: module.TABLE for module in modules(sys.modules[__name__])}
