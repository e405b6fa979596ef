"""Which layers become 4-bit, in what form, and which of them are made together."""

from collections.abc import Mapping, Sequence

from ...kernels.formats import FORMATS
from ...kernels.layer import LayerSpec
from ..families import Family
from ..files.tensor_file import TensorInfo
from ..recipe import KEEP_16BIT, Recipe


def plan_layers(
    infos: Mapping[str, TensorInfo], family: Family, recipe: Recipe, unfit: dict[str, str] | None = None
) -> dict[str, LayerSpec]:
    """layer -> its spec, by the family's table. Layers whose K does not fit the group stay in 16 bit.

    unfit  filled with those layers and the reason
    """
    specs = {}
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
            if unfit is not None:
                unfit[layer] = f"{k} input channels are no multiple of the {fmt.name} group of {fmt.group_size}"
            continue
        if fmt.low_rank:
            act_unsigned = rule.act_unsigned if fmt.unsigned_act else (0, 0)
            specs[layer] = LayerSpec(fmt.name, n, k, recipe.rank, act_unsigned, recipe.act_rule)
        else:
            specs[layer] = LayerSpec(fmt.name, n, k)
    return specs


def group_layers(specs: Mapping[str, LayerSpec], family: Family) -> list[tuple[str, ...]]:
    """All layers in the order of `specs`, those that read the same activation in one group."""
    low_rank = [layer for layer, spec in specs.items() if spec.fmt.low_rank]
    group_of = {}
    for group in family.shared_groups(low_rank):
        if len({(specs[layer].k, specs[layer].act_unsigned) for layer in group}) == 1:
            group_of |= dict.fromkeys(group, group)
    return list(dict.fromkeys(group_of.get(layer, (layer,)) for layer in specs))


def shared_entries(groups: Sequence[tuple[str, ...]]) -> dict[str, str]:
    """layer -> the layer whose statistics it uses, the first of its group, for the others of a group."""
    return {layer: group[0] for group in groups for layer in group[1:]}
