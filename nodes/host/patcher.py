"""Bridge: a ModelPatcher under which a LoRA becomes columns beside those of the low-rank branch.

The host never sees the patches of 4-bit layers while it loads: it would try to add dense deltas to packed bytes.
What it does see are the 16-bit layers, which it patches as ever, and the memory of the LoRAs.
"""

import contextlib
import logging
import uuid
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...quantize.lora.deltas import LoraError
from ...quantize.lora.fit import LoraLimits
from ...quantize.lora.loras import LayerLoras
from ...quantize.lora.patched_weight import Note, PatchedWeight
from .linear import SVDQuantLinear
from .lora_groups import PREFIX, PatchGroup, group_of, hook_group, layer_name, refused_biases, warn_of_unknown
from .patch import MERGE, Patch, known_loras, loras_of
from .save import said_final
from .state import LoadSnapshot, ModelState
from .training import beside

LIMITS = "svdquant_lora_limits"  # attachments
WHEN_SAVED = "svdquant_when_saved"
BAKE, REFUSE = "bake", "refuse"
LOGGER = logging.getLogger("svdquant")
NOTHING = (
    "%s changes nothing in the diffusion model: none of its keys is one that ComfyUI knows there. It is for a text "
    "encoder or another model, or of a spelling that SVDQuant Load LoRA may know"
)


class SVDQuantPatcher(ModelPatcher):
    """In front of whichever ModelPatcher class the host has made. Apply with `adopt`, never construct.

    What belongs to the layers lies on the model, which all clones share: `ModelState`.
    """

    patches: dict[str, list[Any]]  # the host's: weight key -> patches
    svdquant_groups: tuple[PatchGroup, ...] = ()
    _counted: tuple[Any, int] | None = None
    _resolved: tuple[Any, dict[str, LayerLoras]] | None = None
    _cloning = False
    _reported: frozenset[str] = frozenset()

    @property
    def _state(self) -> ModelState:
        return self.model.svdquant

    def packed_layers(self) -> Mapping[str, SVDQuantLinear]:
        """weight key -> 4-bit layer of the model."""
        return self._state.layers

    # -- patches to LoRAs of layers

    def layer_loras(
        self, more: Mapping[str, list[Any]] | None = None, notes: dict[str, list[Note]] | None = None
    ) -> dict[str, LayerLoras]:
        """weight key -> all active patches of a 4-bit layer, `more` after the patcher's own.

        raises  LoraError that names every layer with a patch that cannot be applied: nothing is dropped in silence
        """
        own = not more and notes is None
        if own and self._resolved is not None and self._resolved[0] == self.patches_uuid:
            return self._resolved[1]
        loras: dict[str, LayerLoras] = {}
        refused: list[str] = []
        limits, store = self.lora_limits(), self._state.store
        for key, module in self.packed_layers().items():
            patches = self.patches.get(key, ())
            if more and key in more:
                patches = [*patches, *more[key]]
            if not patches:
                continue
            # first of all, and with nothing built for it: this is every change of a strength
            layer = known_loras(store, key, patches) if notes is None else None
            if layer is None:
                weight = PatchedWeight(key, module.four_bit, module.blob, store, limits, self.load_device)
                try:
                    layer = loras_of(weight, patches)
                except LoraError as error:
                    refused.append(f"{layer_name(key)}: {error}")
                    continue
                if notes is not None:
                    notes[key] = weight.notes
            if layer is not None:
                loras[key] = layer
        refused += refused_biases(self.patches, self.packed_layers())
        if refused:
            rest = f" (and {len(refused) - 5} more layers)" if len(refused) > 5 else ""
            raise LoraError(
                f"{len(refused)} 4-bit layers have a patch that cannot be applied; remove the node that adds it. "
                + "; ".join(refused[:5])
                + rest
            )
        if own:
            self._resolved = self.patches_uuid, loras
        return loras

    def _show(self, loras: Mapping[str, LayerLoras]) -> None:
        self._state.limits = self.lora_limits() if self.get_attachment(WHEN_SAVED) != REFUSE else None
        streamed = getattr(self, "is_dynamic", bool)()  # then every weight stays off the device, the LoRAs must not
        for key, module in self.packed_layers().items():
            module.set_loras(loras.get(key))
            if module.loras_stay != streamed:
                module.loras_stay = streamed

    def _place_loras(self) -> None:
        dtype = self._compute_dtype()
        for module in self.packed_layers().values():
            module.place_loras(self.load_device, dtype)

    # -- adding patches

    def add_patches(
        self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0, *args: Any
    ) -> list[Any]:
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

    # -- training, see training.py

    def set_model_compute_dtype(self, dtype: torch.dtype | None) -> None:
        super().set_model_compute_dtype(dtype)
        self._state.show_shapes(dtype is not None)  # TrainLora is about to look at them

    def add_weight_wrapper(self, name: str, function: Any) -> None:
        layer = self.packed_layers().get(name)
        super().add_weight_wrapper(name, function if layer is None else beside(layer, function))

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
        if not hook:
            self.svdquant_groups += (group,)
        if not group.keys and not group.unknown:  # of a text encoder alone, too: the host goes on as well
            LOGGER.warning(NOTHING, group.file or "a LoRA")
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
        loras, state = self.layer_loras(), self._state  # may refuse: before anything has changed
        room = self.lora_bytes()
        before = {key: module.loras for key, module in self.packed_layers().items()}
        state.show_shapes(False)
        self._take_hooked_off()
        self._show(loras)
        budget = max(lowvram_model_memory - room, 0.1) if lowvram_model_memory else 0
        try:
            with self._hidden_patches():
                result = super().load(device_to, budget, *args, **kwargs)
        except BaseException:
            self._show({key: layer for key, layer in before.items() if layer is not None})
            raise
        self._place_loras()
        if self.model.model_lowvram:  # a whole load has counted them already, as part of model_size
            self.model.model_loaded_weight_memory += room
        state.snapshot = self._now()
        return result

    def partially_load(
        self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False, **kwargs: Any
    ) -> Any:
        """Where only LoRAs of 4-bit layers are other than loaded, no weight is moved: they are swapped in place."""
        state = self._state
        state.show_shapes(False)
        before = state.snapshot
        if before is not None and not force_patch_weights and self._only_loras_differ(before):
            loras = self.layer_loras()
            self.unpatch_hooks()
            self._show(loras)
            self._place_loras()
            now = self._now()
            self.model.model_loaded_weight_memory += now.nbytes - before.nbytes
            state.snapshot = now
            self.model.current_weight_patches_uuid = self.patches_uuid
        return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights, **kwargs)

    def _now(self) -> LoadSnapshot:
        packed = self.packed_layers()
        patches = {key: list(patches) for key, patches in self.patches.items() if key not in packed}
        rest = (
            self.object_patches.get("manual_cast_dtype"),
            self.force_cast_weights,
            dict(self.weight_wrapper_patches),
        )
        return LoadSnapshot(patches, rest, self.lora_bytes())

    def _only_loras_differ(self, before: LoadSnapshot) -> bool:
        loaded = self.model.current_weight_patches_uuid
        if loaded is None or loaded == self.patches_uuid:
            return False
        now = self._now()
        if now.rest != before.rest or now.patches.keys() != before.patches.keys():
            return False
        return all(_same_patches(now.patches[key], before.patches[key]) for key in now.patches)

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        self._state.show_shapes(False)
        with self._hidden_patches():
            freed = super().partially_unload(*args, **kwargs)
        for module in self.packed_layers().values():
            module.leave_device()
        return freed

    def patch_weight_to_device(self, *args: Any, **kwargs: Any) -> Any:
        with self._hidden_patches():
            return super().patch_weight_to_device(*args, **kwargs)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> Any:
        self._state.show_shapes(False)
        result = super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self._state.unhooked.clear()
            self._state.snapshot = None
            self._show({})
        return result

    # -- saving

    def model_state_dict_for_saving(self, model: torch.nn.Module | None = None, prefix: str = "") -> dict[str, Any]:
        """Newer hosts fetch and patch each weight when it is written; the bytes of a 4-bit layer are not their weight.

        What the layers list of themselves is final, so they say that it is. A patched bias is not.
        """
        with said_final(self.packed_layers()) as waiting:
            saved = super().model_state_dict_for_saving(model, prefix)
        for bias in [f"{key.removesuffix('weight')}bias" for key in waiting]:
            if bias in self.patches:
                bare = super().patch_weight_to_device(bias, device_to=self.load_device, return_weight=True)
                saved[bias.removeprefix(prefix)] = bare.to("cpu")
        return saved

    # -- hooks

    def patch_hooks(self, hooks: Any) -> Any:
        packed = self.packed_layers()
        loras: dict[str, LayerLoras | None] = {}
        if hooks is not None:
            combined = self.get_combined_hook_patches(hooks)
            hooked = {key: patches for key, patches in combined.items() if key in packed}
            if hooked:
                everything = self.layer_loras(hooked)  # may refuse: before anything has changed
                loras = {key: everything.get(key) for key in hooked}
        self._take_hooked_off()
        result = super().patch_hooks(hooks)
        for key, layer in loras.items():
            self._state.unhooked[key] = packed[key].loras
            packed[key].set_loras(layer)
        self._place_loras()
        return result

    def patch_hook_weight_to_device(self, hooks: Any, combined_patches: Any, key: str, *args: Any, **kw: Any) -> Any:
        if key in self.packed_layers():
            return None  # patch_hooks has its LoRAs
        return super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kw)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        if not whitelist_keys_set and self._state.unhooked:
            self._take_hooked_off()
            self._place_loras()
        super().unpatch_hooks(whitelist_keys_set)

    def _take_hooked_off(self) -> None:
        """Give every layer that has a hook's LoRAs what it had before."""
        packed, unhooked = self.packed_layers(), self._state.unhooked
        for key, loras in unhooked.items():
            packed[key].set_loras(loras)
        unhooked.clear()

    def groups(self) -> list[PatchGroup]:
        """What was added, in order; registered hooks last."""
        return [*self.svdquant_groups, *map(hook_group, filter(None, self.hook_patches.values()))]

    def hooked_patches(self) -> dict[str, list[Any]]:
        """weight key -> the patches of all registered hooks on a 4-bit layer."""
        packed = self.packed_layers()
        hooked: dict[str, list[Any]] = {}
        for patches in self.hook_patches.values():
            for key in patches.keys() & packed.keys():
                hooked.setdefault(key, []).extend(patches[key])
        return hooked

    # -- memory

    def _compute_dtype(self) -> torch.dtype:
        return getattr(self.model, "manual_cast_dtype", None) or self.model.get_dtype()

    def lora_bytes(self) -> int:
        """Bytes of the LoRAs of 4-bit layers on the device, all hooks' included; counted once per set of patches."""
        if self._counted is None or self._counted[0] != self.patches_uuid:
            numbers = sum(loras.numel for loras in self.layer_loras(self.hooked_patches()).values())
            nbytes = numbers * self._compute_dtype().itemsize
            self._counted = self.patches_uuid, nbytes
        return self._counted[1]

    def model_size(self) -> int:
        """Weights and LoRAs: what the host makes room for."""
        return super().model_size() + (0 if self._cloning else self.lora_bytes())

    def memory_required(self, input_shape: Any) -> Any:
        return super().memory_required(input_shape) + self.lora_bytes()

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        self._cloning = True  # the clone is to start from the size of the weights alone
        try:
            other = adopt(super().clone(*args, **kwargs))  # newer hosts may hand back a bare ModelPatcher
        finally:
            self._cloning = False
        other.svdquant_groups, other._reported = self.svdquant_groups, self._reported
        if kwargs.get("force_deepcopy"):  # a model of its own, for TrainLora
            other._state.show_shapes(True)
        return other

    def lora_limits(self) -> LoraLimits:
        return self.get_attachment(LIMITS) or LoraLimits()

    def set_lora_limits(self, limits: LoraLimits) -> None:
        """How far patches without an exact form may be approximated, from now on."""
        self.set_attachments(LIMITS, limits)
        self.patches_uuid = uuid.uuid4()

    def set_when_saved(self, choice: str) -> None:
        """What a save node of the host does with LoRAs of 4-bit layers: BAKE or REFUSE, from now on."""
        self.set_attachments(WHEN_SAVED, choice)
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
def _patcher_class(base: type[ModelPatcher]) -> type[SVDQuantPatcher]:
    return type(f"SVDQuant{base.__name__}", (SVDQuantPatcher, base), {})


def adopt(patcher: ModelPatcher) -> SVDQuantPatcher:
    """Put SVDQuantPatcher in front of the patcher's own class, whatever class the host chose.

    The host makes patchers itself, in loaders and in `clone`, and takes no class for them; a wrapper around one would
    not be the object that the host holds on to. So the object stays and its class is replaced by a subclass of it,
    which adds methods and no data of its own: everything that the object holds remains valid.
    """
    if not isinstance(patcher, SVDQuantPatcher):
        patcher.__class__ = _patcher_class(patcher.__class__)
    if not hasattr(patcher.model, "svdquant"):
        patcher.model.svdquant = ModelState.of(patcher.model)
    return patcher
