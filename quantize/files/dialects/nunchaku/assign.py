"""Which stored tensor is which part of ComfyUI's model, from names alone."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ...checkpoint import CheckpointError
from .tables import Block, LinearRow, NameMap, split_name


@dataclass(frozen=True)
class Placement:
    """One linear of the model with the stored modules it is made of.

    stored    full stored names, one per part
    hosts     full ComfyUI names
    spelling  index into LinearRow.spellings
    """

    linear: LinearRow
    hosts: tuple[str, ...]
    stored: tuple[str, ...]
    spelling: int

    @property
    def apart(self) -> bool:
        """Whether file and ComfyUI have the same several linears."""
        return len(self.hosts) > 1 and len(self.stored) == len(self.hosts)


@dataclass(frozen=True)
class Assignment:
    """linears, {ComfyUI's tensor name: stored name} of everything that is no linear, and 16-bit tensors of no place

    Nunchaku's loaders leave out what their model does not have.
    """

    linears: list[Placement]
    tensors: dict[str, str]
    extras: tuple[str, ...] = ()


def assign(names: NameMap, keys: Iterable[str], file: str) -> Assignment:
    """Give every stored tensor its place in the model.

    keys    stored tensor names without prefix
    raises  CheckpointError for 4-bit layers that have no place, places that stay empty and two spellings at once
    """
    keys = list(keys)
    stored_keys = set(keys)
    modules = {key.rpartition(".")[0] for key in keys}
    found: list[Placement] = []
    tensors: dict[str, str] = {}
    used: set[str] = set()
    for block in names.blocks:
        groups = _by_number(block, modules, keys)
        _check_numbers(block, groups, file)
        for number, (inside, inside_keys) in groups.items():
            for linear in block.linears:
                placement = _assign_linear(block, number, linear, inside, file)
                if placement is not None:
                    found.append(placement)
                    used.update(placement.stored)
            for host, spellings in {**block.tensors, **block.optional_tensors}.items():
                stored = [name for name in spellings if name in inside_keys]
                if stored:
                    tensors[block.host_name(number, host)] = block.stored_name(number, stored[0])
                elif host in block.tensors:
                    raise CheckpointError(
                        f"{file}: {block.stored_name(number, spellings[0])!r} is missing; {names.name} needs it. "
                        "The file is not whole or of another model."
                    )
    taken = set(tensors.values())
    left = sorted(key for key in keys if key not in taken and key.rpartition(".")[0] not in used)
    packed = [key for key in left if f"{key.rpartition('.')[0]}.qweight" in stored_keys]
    if packed:
        raise CheckpointError(
            f"{file}: {len(packed)} tensors of 4-bit layers have no place in {names.name}, first {packed[0]!r}. "
            "The file is of another model, or of a variant that this version does not know."
        )
    return Assignment(found, tensors, tuple(left))


def _by_number(block: Block, modules: set[str], keys: list[str]) -> dict[int | None, tuple[set[str], set[str]]]:
    """block number -> (module names, tensor names) within the block, of names that the block's table knows"""
    known_modules = {part.name for linear in block.linears for spelling in linear.spellings for part in spelling}
    known_keys = {name for names in {**block.tensors, **block.optional_tensors}.values() for name in names}
    groups: dict[int | None, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for position, names, known in ((0, modules, known_modules), (1, keys, known_keys)):
        for name in names:
            split = split_name(block.stored, name)
            if split is not None and split[1] in known:
                groups[split[0]][position].add(split[1])
    return dict(sorted(groups.items(), key=lambda item: item[0] or 0))


def _check_numbers(block: Block, groups: dict[int | None, tuple[set[str], set[str]]], file: str) -> None:
    if not groups and not block.optional:
        raise CheckpointError(f"{file}: no tensor of {block.stored or 'the model outside its blocks'!r} is there")
    numbers = list(groups)
    if "#" in block.stored and numbers != list(range(len(numbers))):
        gap = next(i for i, number in enumerate(numbers) if i != number)
        raise CheckpointError(
            f"{file}: {block.stored.replace('#', str(gap))!r} is missing, there are blocks up to {numbers[-1]}. "
            "The file is not whole: download it again."
        )


def _assign_linear(
    block: Block, number: int | None, linear: LinearRow, inside: set[str], file: str
) -> Placement | None:
    hosts = tuple(block.host_name(number, host) for host in linear.host)
    whole = [i for i, spelling in enumerate(linear.spellings) if all(part.name in inside for part in spelling)]
    touched = {part.name for spelling in linear.spellings for part in spelling if part.name in inside}
    if not whole:
        if not touched and linear.optional:
            return None
        spelling = max(linear.spellings, key=lambda parts: sum(part.name in inside for part in parts))
        missing = next(part.name for part in spelling if part.name not in inside)
        raise CheckpointError(
            f"{file}: layer {block.stored_name(number, missing)!r} is missing; {' and '.join(map(repr, hosts))} "
            "of the model is made of it. The file is not whole or of another model."
        )
    parts = linear.spellings[whole[0]]
    extra = sorted(touched - {part.name for part in parts})
    if extra:
        raise CheckpointError(
            f"{file}: layer {hosts[0]!r} is there twice, as {block.stored_name(number, parts[0].name)!r} and as "
            f"{block.stored_name(number, extra[0])!r}. The file mixes two spellings: write it again from its source."
        )
    stored = tuple(block.stored_name(number, part.name) for part in parts)
    return Placement(linear, hosts, stored, whole[0])


def is_lite_only(placement: Placement) -> bool | None:
    """True if only Nunchaku Lite has these names, False if only Nunchaku has them, None if both do."""
    linear = placement.linear
    names = tuple(part.name for part in linear.spellings[placement.spelling])
    nunchaku = {tuple(part.name for part in spelling) for spelling in (linear.stored, *linear.also)}
    lite = tuple(part.name for part in linear.lite or linear.stored)
    if names in nunchaku:
        return None if names == lite else False
    return True
