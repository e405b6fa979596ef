"""First step, plan: which layers become 4-bit, in what form, and which of them are made together."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ...kernels.formats import FORMATS
from ...kernels.layer import LayerSpec
from ..families import FAMILIES, Family, detect
from ..files.source import Source
from ..files.spelling import name_in_the_way
from ..files.tensor_file import TensorInfo
from ..recipe import KEEP_16BIT, SHARED, Recipe


class QuantizeError(ValueError):
    """A model cannot be quantized. The message names the layer."""


@dataclass(frozen=True)
class Plan:
    """What a family's table makes of a model.

    specs   layer -> its spec
    groups  all layers in the order of `specs`, those that read the same activation together
    shared  those of `groups` whose layers are fitted as one and have one proj_down
    unfit   layer -> why it stays in 16 bit though the table names it
    dtype   of stored 16-bit tensors
    """

    family: Family
    specs: Mapping[str, LayerSpec]
    groups: tuple[tuple[str, ...], ...]
    unfit: Mapping[str, str]
    dtype: torch.dtype
    shared: frozenset[tuple[str, ...]] = frozenset()

    def branches(self, group: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        """A group in parts that have one low-rank branch each."""
        return (group,) if group in self.shared else tuple((layer,) for layer in group)

    @cached_property
    def inputs(self) -> dict[str, int]:
        """layer -> input channels, for the first layer of each group whose activations are rounded."""
        first = (group[0] for group in self.groups)
        return {layer: self.specs[layer].k for layer in first if self.specs[layer].fmt.low_rank}

    @cached_property
    def shared_inputs(self) -> dict[str, str]:
        """layer -> the layer whose statistics it uses, the first of its group, for the others of a group."""
        return {layer: group[0] for group in self.groups for layer in group[1:]}


def plan_model(source: Source, recipe: Recipe) -> Plan:
    """The plan for a source of 16-bit weights. Raises QuantizeError where nothing can become 4-bit, and FamilyError."""
    family = detect(source.infos) if source.family is None else FAMILIES[source.family]
    plan = plan_layers(source.infos, family, recipe)
    if not plan.specs:
        raise QuantizeError(f"{source.name}: no linear layer of family {family.name} can become 4-bit")
    if name := name_in_the_way(source.infos, plan.specs):
        raise QuantizeError(
            f"{source.name}: {name} is named like a part of a 4-bit layer, and the file could not be read again. The "
            "model is damaged, or quantized in a way that is not known here: use its 16-bit original"
        )
    return plan


def plan_layers(infos: Mapping[str, TensorInfo], family: Family, recipe: Recipe) -> Plan:
    """The plan by the family's table. Layers whose K does not fit the group stay in 16 bit, and are `unfit`."""
    specs, unfit = {}, {}
    for key, info in infos.items():
        layer = key.removesuffix(".weight")
        if layer == key or len(info.shape) != 2:
            continue
        n, k = info.shape
        rule = family.rule(layer, n, k)
        if rule is None or (rule.kind == "w4a16" and recipe.modulation == KEEP_16BIT):
            continue
        fmt = FORMATS[recipe.modulation if rule.kind == "w4a16" else recipe.format]
        if k % fmt.group_size:
            unfit[layer] = f"{k} input channels are no multiple of the {fmt.name} group of {fmt.group_size}"
        elif fmt.low_rank:
            act_unsigned = rule.act_unsigned if fmt.unsigned_act else (0, 0)
            specs[layer] = LayerSpec(fmt.name, n, k, recipe.rank, act_unsigned, recipe.act_rule)
        else:
            specs[layer] = LayerSpec(fmt.name, n, k)
    # fp16 stays fp16; everything else is stored as bf16, whose range no weight overflows
    dtypes = {infos[f"{layer}.weight"].dtype for layer in specs}
    dtype = torch.float16 if dtypes == {torch.float16} else torch.bfloat16
    groups = group_layers(specs, family)
    shared = frozenset(group for group in groups if recipe.branches == SHARED and _are_alike(group, specs, infos))
    return Plan(family, specs, groups, unfit, dtype, shared)


def _are_alike(group: tuple[str, ...], specs: Mapping[str, LayerSpec], infos: Mapping[str, TensorInfo]) -> bool:
    """Whether several layers can be one with their outputs side by side."""
    kinds = {(replace(specs[layer], n=0), f"{layer}.bias" in infos) for layer in group}
    return len(group) > 1 and len(kinds) == 1


def group_layers(specs: Mapping[str, LayerSpec], family: Family) -> tuple[tuple[str, ...], ...]:
    """All layers in the order of `specs`, those that read the same activation in one group."""
    low_rank = [layer for layer, spec in specs.items() if spec.fmt.low_rank]
    group_of: dict[str, tuple[str, ...]] = {}
    for group in family.shared_groups(low_rank):
        if len({(specs[layer].k, specs[layer].act_unsigned) for layer in group}) == 1:
            group_of |= dict.fromkeys(group, group)
    return tuple(dict.fromkeys(group_of.get(layer, (layer,)) for layer in specs))
