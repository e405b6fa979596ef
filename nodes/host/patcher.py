"""Bridge: a ModelPatcher under which a LoRA becomes columns of the low-rank branch.

The host never sees the patches of 4-bit layers while it loads: it would try to add dense deltas to packed bytes.
What it does see are the 16-bit layers, which it patches as ever, and the memory of the branches.
"""

import contextlib
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...quantize.linear import LowRank
from ...quantize.lora.branch import Branch
from ...quantize.lora.fit import LoraLimits
from ...quantize.lora.terms import LoraError
from .linear import SVDQuantLinear
from .lora import Note, PartStore, branch_of
from .lora_groups import PREFIX, PatchGroup, group_of, hook_group, layer_name, refused_biases, warn_of_unknown
from .patch import MERGE, Patch

LIMITS = "svdquant_lora_limits"  # attachment
LOGGER = logging.getLogger("svdquant")


@dataclass(frozen=True, eq=False)
class Shown:
    """What is loaded at the moment: the host's view of the patches, and the bytes of the branches."""

    patches: Mapping[str, list[Any]]
    rest: tuple[Any, ...]
    nbytes: int


class SVDQuantPatcher:
    """Mixin in front of whichever ModelPatcher class the host has made. Apply with `adopt`.

    State that belongs to the layers lies on the model, which all clones share: `svdquant_layers`, `svdquant_parts`
    (factored patches), `svdquant_shown` (what is loaded), `svdquant_room` (bytes of branches in the count of a partly
    loaded model) and `svdquant_hooked` (branches behind those of hooks).
    """

    svdquant_groups: tuple[PatchGroup, ...] = ()
    _counted: tuple[Any, int] | None = None
    _resolved: tuple[Any, dict[str, Branch]] | None = None
    _cloning = False
    _reported: frozenset[str] = frozenset()

    def packed_layers(self) -> dict[str, SVDQuantLinear]:
        """weight key -> 4-bit layer of the model, found once by `adopt`."""
        return self.model.svdquant_layers

    # -- patches to branches

    def branches(
        self, more: Mapping[str, list[Any]] | None = None, notes: dict[str, list[Note]] | None = None
    ) -> dict[str, Branch]:
        """weight key -> all active patches of a 4-bit layer as one branch, `more` after the patcher's own.

        raises  LoraError that names every layer with a patch that cannot be applied: nothing is dropped in silence
        """
        own = not more and notes is None
        if own and self._resolved is not None and self._resolved[0] == self.patches_uuid:
            return self._resolved[1]
        made, refused, more = {}, [], more or {}
        limits, store = self.lora_limits(), self.model.svdquant_parts
        for key, module in self.packed_layers().items():
            patches = self.patches.get(key, ())
            if key in more:
                patches = [*patches, *more[key]]
            if not patches:
                continue
            said = None if notes is None else notes.setdefault(key, [])
            try:
                branch = branch_of(key, module, patches, store, limits, self.load_device, said)
            except LoraError as error:
                refused.append(f"{layer_name(key)}: {error}")
                continue
            if branch is not None:
                made[key] = branch
        refused += refused_biases(self.patches, self.packed_layers())
        if refused:
            rest = f" (and {len(refused) - 5} more layers)" if len(refused) > 5 else ""
            raise LoraError(
                f"{len(refused)} 4-bit layers have a patch that cannot be applied; remove the node that adds it. "
                + "; ".join(refused[:5])
                + rest
            )
        if own:
            self._resolved = self.patches_uuid, made
        return made

    def low_rank_patches(self) -> dict[str, LowRank]:
        """weight key -> (lora_down, lora_up) of all active patches of a 4-bit layer, strengths folded in."""
        layers = self.packed_layers()
        return {key: branch.columns(layers[key].packed.spec) for key, branch in self.branches().items()}

    def _show(self, branches: Mapping[str, Branch]) -> None:
        streamed = getattr(self, "is_dynamic", bool)()  # then every weight stays off the device, a branch must not
        for key, module in self.packed_layers().items():
            module.set_lora(branches.get(key))
            if module.branch_stays != streamed:
                module.branch_stays = streamed

    # -- adding patches

    def add_patches(
        self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0, *args: Any
    ) -> list[Any]:
        if not patches:
            raise LoraError(
                "none of the keys in this LoRA belongs to this model: it was trained for another model, or the file "
                "is empty (the console lists the keys)"
            )
        self._refuse_merges(patches)
        added = super().add_patches(patches, strength_patch, strength_model, *args)
        self._record(patches, added, strength_patch, hook=False)
        return added

    def add_hook_patches(
        self, hook: Any, patches: Mapping[Any, Any], strength_patch: float = 1.0, *args: Any, **kwargs: Any
    ) -> list[Any]:
        self._refuse_merges(patches)
        added = super().add_hook_patches(hook, patches, strength_patch, *args, **kwargs)
        self._record(patches, added, strength_patch, hook=True)  # the host adds them anew for every run
        return added

    def _refuse_merges(self, patches: Mapping[Any, Any]) -> None:
        packed = self.packed_layers()
        for target, value in patches.items():
            key = target if isinstance(target, str) else target[0]
            if key in packed and isinstance(value, list):
                raise LoraError(f"{layer_name(key)}: {MERGE}")
            if key.rpartition(".")[0] + ".weight" in packed and key.rpartition(".")[2] not in ("weight", "bias"):
                raise LoraError(f"{key.removeprefix(PREFIX)} is a part of a 4-bit layer; patch its weight or its bias")

    def _record(self, patches: Mapping[Any, Any], added: list[Any], strength: float, hook: bool) -> None:
        group = group_of(patches, added, strength)
        if not hook and (group.keys or group.unknown):
            self.svdquant_groups += (group,)
        new = [key for key in group.unknown if key not in self._reported]
        if new:
            self._reported |= set(new)
            warn_of_unknown(new, list(self.model_state_dict(PREFIX)))

    def get_key_patches(self, filter_prefix: str | None = None) -> Any:
        if filter_prefix is not None:  # only merge nodes ask for a part of the model
            raise LoraError(MERGE)
        return super().get_key_patches(filter_prefix)

    # -- loading

    @contextlib.contextmanager
    def _hidden_patches(self) -> Iterator[None]:
        everything, packed = self.patches, self.packed_layers()
        self.patches = {key: patches for key, patches in everything.items() if key not in packed}
        try:
            yield
        finally:
            self.patches = everything

    def load(self, device_to: Any = None, lowvram_model_memory: float = 0, *args: Any, **kwargs: Any) -> Any:
        branches = self.branches()  # may refuse: before anything has changed
        if branches and kwargs.get("force_patch_weights"):
            LOGGER.warning(
                "LoRAs of 4-bit layers are not part of the weights: a file saved by ComfyUI will not have them. "
                "SVDQuant Bake LoRA writes a file that has."
            )
        room = self.branch_bytes()
        before = {key: module.branch for key, module in self.packed_layers().items()}
        self._restore_hooked()
        self._show(branches)
        self.model.model_loaded_weight_memory -= self.model.svdquant_room  # hosts differ in who starts from nothing
        self.model.svdquant_room = 0
        budget = max(lowvram_model_memory - room, 0.1) if lowvram_model_memory else 0
        try:
            with self._hidden_patches():
                result = super().load(device_to, budget, *args, **kwargs)
        except BaseException:
            self._show({key: branch for key, branch in before.items() if branch is not None})
            raise
        if self.model.model_lowvram:  # a whole load has counted them already, as part of model_size
            self.model.model_loaded_weight_memory += room
            self.model.svdquant_room = room
        self.model.svdquant_shown = self._now()
        return result

    def partially_load(
        self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False, **kwargs: Any
    ) -> Any:
        """Where only branches differ from what is loaded, no weight is moved: they are swapped in place."""
        shown = self.model.svdquant_shown
        if shown is not None and not force_patch_weights and self._only_branches_differ(shown):
            branches = self.branches()
            self.unpatch_hooks()
            self._show(branches)
            now = self._now()
            self.model.model_loaded_weight_memory += now.nbytes - shown.nbytes
            if self.model.model_lowvram:
                self.model.svdquant_room += now.nbytes - shown.nbytes
            self.model.svdquant_shown = now
            self.model.current_weight_patches_uuid = self.patches_uuid
        return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights, **kwargs)

    def _now(self) -> Shown:
        packed = self.packed_layers()
        patches = {key: list(patches) for key, patches in self.patches.items() if key not in packed}
        rest = (
            self.object_patches.get("manual_cast_dtype"),
            self.force_cast_weights,
            dict(self.weight_wrapper_patches),
        )
        return Shown(patches, rest, self.branch_bytes())

    def _only_branches_differ(self, shown: Shown) -> bool:
        loaded = self.model.current_weight_patches_uuid
        if loaded is None or loaded == self.patches_uuid:
            return False
        now = self._now()
        if now.rest != shown.rest or now.patches.keys() != shown.patches.keys():
            return False
        return all(_same_patches(now.patches[key], shown.patches[key]) for key in now.patches)

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        with self._hidden_patches():
            freed = super().partially_unload(*args, **kwargs)
        for module in self.packed_layers().values():
            module.leave_device()
        return freed

    def patch_weight_to_device(self, *args: Any, **kwargs: Any) -> Any:
        with self._hidden_patches():
            return super().patch_weight_to_device(*args, **kwargs)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> Any:
        result = super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self.model.svdquant_hooked.clear()
            self.model.svdquant_shown, self.model.svdquant_room = None, 0
            self._show({})
        return result

    # -- hooks

    def patch_hooks(self, hooks: Any) -> Any:
        packed, branches = self.packed_layers(), {}
        if hooks is not None:
            combined = self.get_combined_hook_patches(hooks)
            hooked = {key: patches for key, patches in combined.items() if key in packed}
            if hooked:
                everything = self.branches(hooked)  # may refuse: before anything has changed
                branches = {key: everything.get(key) for key in hooked}
        self._restore_hooked()
        result = super().patch_hooks(hooks)
        for key, branch in branches.items():
            self.model.svdquant_hooked[key] = packed[key].branch
            packed[key].set_lora(branch)
        return result

    def patch_hook_weight_to_device(self, hooks: Any, combined_patches: Any, key: str, *args: Any, **kw: Any) -> Any:
        if key in self.packed_layers():
            return None  # patch_hooks has its branch
        return super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kw)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        if not whitelist_keys_set:
            self._restore_hooked()
        super().unpatch_hooks(whitelist_keys_set)

    def _restore_hooked(self) -> None:
        packed, hooked = self.packed_layers(), self.model.svdquant_hooked
        for key, branch in hooked.items():
            packed[key].set_lora(branch)
        hooked.clear()

    def groups(self) -> list[PatchGroup]:
        """What was added, in order; registered hooks last."""
        return [*self.svdquant_groups, *map(hook_group, filter(None, self.hook_patches.values()))]

    def hooked_patches(self) -> dict[str, list[Any]]:
        """weight key -> the patches of all registered hooks on a 4-bit layer."""
        packed, hooked = self.packed_layers(), {}
        for patches in self.hook_patches.values():
            for key in patches.keys() & packed.keys():
                hooked.setdefault(key, []).extend(patches[key])
        return hooked

    # -- memory

    def branch_bytes(self) -> int:
        """Bytes of the branches on the device, those of all hooks included; counted once per set of patches."""
        if self._counted is None or self._counted[0] != self.patches_uuid:
            dtype = getattr(self.model, "manual_cast_dtype", None) or self.model.get_dtype()
            nbytes = sum(branch.numel for branch in self.branches(self.hooked_patches()).values()) * dtype.itemsize
            self._counted = self.patches_uuid, nbytes
        return self._counted[1]

    def model_size(self) -> int:
        """Weights and branches: what the host makes room for."""
        return super().model_size() + (0 if self._cloning else self.branch_bytes())

    def memory_required(self, input_shape: Any) -> Any:
        return super().memory_required(input_shape) + self.branch_bytes()

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        self._cloning = True  # the clone is to start from the size of the weights alone
        try:
            other = adopt(super().clone(*args, **kwargs))  # newer hosts may hand back a bare ModelPatcher
        finally:
            self._cloning = False
        other.svdquant_groups, other._reported = self.svdquant_groups, self._reported
        return other

    def lora_limits(self) -> LoraLimits:
        return self.get_attachment(LIMITS) or LoraLimits()

    def set_lora_limits(self, limits: LoraLimits) -> None:
        """How far patches without an exact form may be approximated, from now on."""
        self.set_attachments(LIMITS, limits)
        self.patches_uuid = uuid.uuid4()


def _same_patches(left: list[Any], right: list[Any]) -> bool:
    if len(left) != len(right):
        return False
    for one, other in zip((Patch(*patch) for patch in left), (Patch(*patch) for patch in right), strict=True):
        numbers = (one.strength, one.strength_model) == (other.strength, other.strength_model)
        if not numbers or isinstance(one.value, list) or one.identity() != other.identity():
            return False
    return True


@cache
def _patcher_class(base: type) -> type:
    return type(f"SVDQuant{base.__name__}", (SVDQuantPatcher, base), {})


def adopt(patcher: ModelPatcher) -> ModelPatcher:
    """Put SVDQuantPatcher in front of the patcher's own class, whatever class the host chose."""
    if not isinstance(patcher, SVDQuantPatcher):
        patcher.__class__ = _patcher_class(type(patcher))
    model = patcher.model
    if not hasattr(model, "svdquant_layers"):
        model.svdquant_layers = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, SVDQuantLinear) and module.packed is not None
        }
        model.svdquant_parts, model.svdquant_shown, model.svdquant_hooked = PartStore(), None, {}
        model.svdquant_room = 0
    return patcher
