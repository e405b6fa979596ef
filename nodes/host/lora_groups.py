"""Bridge: which patches came together, which keys found no place, which biases cannot take a patch."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .executing import executing_lora
from .linear import SVDQuantLinear
from .patch import Patch

PREFIX = "diffusion_model."  # of the model's keys in a ModelPatcher
LOGGER = logging.getLogger("svdquant")
NAMED = 5  # keys that one line of the log names


def layer_name(weight_key: str) -> str:
    """diffusion_model.X.weight -> X"""
    return weight_key.removeprefix(PREFIX).removesuffix(".weight")


@dataclass(frozen=True, eq=False)
class PatchGroup:
    """What one call added, usually one LoRA file.

    values   the patches as the host holds them
    unknown  keys that the model does not have
    hook     whether it acts where a conditioning asks for it, not always
    file     name in models/loras, where it is known
    """

    values: tuple[Any, ...]
    keys: tuple[str, ...]
    unknown: tuple[str, ...]
    strength: float
    hook: bool = False
    file: str | None = None


def group_of(patches: Mapping[Any, Any], added: Sequence[Any], strength: float) -> PatchGroup:
    """What one call of add_patches has added, and what not."""
    done = set(added)
    unknown = {_key(target) for target in patches if target not in done}
    ours = sorted(key for key in unknown if key.startswith(PREFIX))  # the others are a text encoder's
    values = tuple(patches[target] for target in added)
    return PatchGroup(values, tuple(sorted(set(map(_key, added)))), tuple(ours), strength, file=executing_lora())


def hook_group(by_key: Mapping[str, Sequence[tuple[Any, ...]]]) -> PatchGroup:
    """What one registered hook adds."""
    patches = [patch for patches in by_key.values() for patch in patches]
    return PatchGroup(tuple(patch[1] for patch in patches), tuple(sorted(by_key)), (), patches[0][0], hook=True)


def _key(target: Any) -> str:
    return target if isinstance(target, str) else target[0]


def warn_of_unknown(unknown: Sequence[str], known: Sequence[str]) -> None:
    """One line in the log: keys that the model does not have, each with the nearest that it has."""
    near = {key: difflib.get_close_matches(key, known, 2, 0.6) for key in unknown[:NAMED]}
    LOGGER.warning(
        "%d patches are for keys that the model does not have: %s%s",
        len(unknown),
        "; ".join(f"{key} (nearest: {', '.join(names) or 'none'})" for key, names in near.items()),
        "" if len(unknown) <= NAMED else f" and {len(unknown) - NAMED} more",
    )


def refused_biases(patches: Mapping[str, Sequence[Any]], packed: Mapping[str, SVDQuantLinear]) -> list[str]:
    """Why biases cannot take their patches: that of a layer with unsigned activations also holds their shift."""
    refused = []
    for bias in [key for key in patches if key.endswith(".bias")]:
        key = f"{bias.removesuffix('bias')}weight"
        if key not in packed or packed[key].four_bit.spec.act_unsigned == (0, 0):
            continue
        named = [Patch(*patch) for patch in patches[bias]]
        kinds = {patch.kind for patch in named if patch.strength_model != 1 or patch.kind != "diff"}
        if kinds:
            refused.append(f"{layer_name(key)}: its bias can be added to, not replaced or scaled ({min(kinds)})")
    return refused
