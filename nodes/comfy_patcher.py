"""Bridge: a ModelPatcher under which a LoRA becomes columns of the low-rank branch.

The host never sees the patches of 4-bit layers while it loads: it would try to add dense deltas to packed bytes.
"""

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter

from ..quantize.linear import LowRank
from ..quantize.lora import LoraError, columns, join
from .comfy_linear import SVDQuantLinear

PREFIX = "diffusion_model."  # of the model's keys in a ModelPatcher


def layer_name(weight_key: str) -> str:
    """diffusion_model.X.weight -> X"""
    return weight_key.removeprefix(PREFIX).removesuffix(".weight")


class SVDQuantPatcher:
    """Mixin in front of whichever ModelPatcher class the host has made. Apply with `adopt`."""

    def packed_layers(self) -> dict[str, SVDQuantLinear]:
        """weight key -> 4-bit layer of the model, found once by `adopt`."""
        return self.model.svdquant_layers

    def low_rank_patches(self) -> dict[str, LowRank]:
        """weight key -> all active patches of a 4-bit layer as one branch.

        raises  LoraError that names every layer with a patch of another kind: nothing is dropped in silence
        """
        branches, refused = {}, []
        for key, module in self.packed_layers().items():
            try:
                made = [columns(*_factors(patch), module.packed.spec) for patch in self.patches.get(key, ())]
            except LoraError as error:
                refused.append(f"{layer_name(key)}: {error}")
                continue
            if made:
                branches[key] = join(made)
        if refused:
            more = f" (and {len(refused) - 5} more layers)" if len(refused) > 5 else ""
            raise LoraError(
                f"{len(refused)} 4-bit layers have a patch that cannot be applied; remove the node that adds it. "
                + "; ".join(refused[:5])
                + more
            )
        return branches

    @contextlib.contextmanager
    def _hidden_patches(self) -> Iterator[None]:
        everything, packed = self.patches, self.packed_layers()
        self.patches = {key: patches for key, patches in everything.items() if key not in packed}
        try:
            yield
        finally:
            self.patches = everything

    def add_patches(self, patches: dict[Any, Any], *args: Any, **kwargs: Any) -> list[Any]:
        if not patches:
            raise LoraError(
                "none of the keys in this LoRA belongs to this model: it was trained for another model "
                "(the console lists the keys)"
            )
        return super().add_patches(patches, *args, **kwargs)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        branches = self.low_rank_patches()  # may refuse: before anything has changed
        for key, module in self.packed_layers().items():
            module.set_lora(branches.get(key))
        with self._hidden_patches():
            return super().load(*args, **kwargs)

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        with self._hidden_patches():
            return super().partially_unload(*args, **kwargs)

    def patch_weight_to_device(self, *args: Any, **kwargs: Any) -> Any:
        with self._hidden_patches():
            return super().patch_weight_to_device(*args, **kwargs)

    def patch_hook_weight_to_device(self, hooks: Any, combined_patches: Any, key: str, *args: Any) -> Any:
        if key in self.packed_layers() and key in combined_patches:
            raise LoraError(f"{key}: hook LoRAs are not supported on 4-bit layers yet; use the LoRA loader nodes")
        return super().patch_hook_weight_to_device(hooks, combined_patches, key, *args)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> Any:
        if unpatch_weights:
            for module in self.packed_layers().values():
                module.set_lora(None)
        return super().unpatch_model(device_to, unpatch_weights)

    def memory_required(self, input_shape: Any) -> Any:
        packed = self.packed_layers()
        factors = (
            tensor
            for key, patches in self.patches.items()
            if key in packed
            for patch in patches
            for tensor in getattr(patch[1], "weights", ())
            if isinstance(tensor, torch.Tensor)
        )
        return super().memory_required(input_shape) + sum(2 * tensor.numel() for tensor in factors)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        return adopt(super().clone(*args, **kwargs))  # newer hosts may hand back a bare ModelPatcher


def _factors(patch: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, float, tuple[int, int, int] | None]:
    """(up, down, scale, offset) of one entry of ModelPatcher.patches. Raises LoraError if it is not a plain LoRA."""
    strength, adapter, strength_model, offset, function = patch
    if not isinstance(adapter, LoRAAdapter):
        kind = getattr(adapter, "name", None) or (adapter[0] if isinstance(adapter, tuple) else type(adapter).__name__)
        raise LoraError(f"the patch is of kind {kind!r}, a 4-bit layer takes LoRA")
    up, down, alpha, mid, dora_scale, reshape = (*adapter.weights, None, None)[:6]
    extras = {"a mid matrix": mid, "a DoRA magnitude": dora_scale, "a new shape": reshape, "a function": function}
    for name, extra in extras.items():
        if extra is not None:
            raise LoraError(f"the LoRA carries {name}, a 4-bit layer takes plain LoRA")
    if strength_model != 1.0:
        raise LoraError(f"the patch scales the model's own weight by {strength_model}, a 4-bit weight is fixed")
    scale = strength if alpha is None else strength * float(alpha) / down.shape[0]
    return up, down, scale, offset


@cache
def _patcher_class(base: type) -> type:
    return type(f"SVDQuant{base.__name__}", (SVDQuantPatcher, base), {})


def adopt(patcher: ModelPatcher) -> ModelPatcher:
    """Put SVDQuantPatcher in front of the patcher's own class, whatever class the host chose."""
    if not isinstance(patcher, SVDQuantPatcher):
        patcher.__class__ = _patcher_class(type(patcher))
    if not hasattr(patcher.model, "svdquant_layers"):
        patcher.model.svdquant_layers = {
            f"{name}.weight": module
            for name, module in patcher.model.named_modules()
            if isinstance(module, SVDQuantLinear) and module.packed is not None
        }
    return patcher
