"""ComfyUI's dynamic VRAM on a machine without a GPU: its own patcher and its own casts, on memory that is pretended.

Only the leaves are replaced: pages of video memory are bytes here, pinned host memory is none. What is resident, moved,
patched and saved is decided by ComfyUI's code. Nothing here says anything about streams, speed or a real GPU.
"""

from typing import Any

import torch
from safetensors.torch import load_file

DEVICE = torch.device("cpu", 0)  # "the GPU"; the CPU has no index


class Pages:
    """Video memory of one model. Nothing is resident before it is asked for, and a new page holds rubbish."""

    budget = 1 << 40

    def __init__(self, size: int, device: Any) -> None:
        self.bytes = torch.zeros(int(size), dtype=torch.uint8)
        self.end, self.turn = 0, 0
        self.resident: dict[int, tuple[int, int]] = {}

    def prioritize(self, *ignored: Any) -> None:
        pass

    def alloc(self, size: int) -> tuple["Pages", int, int]:
        start = -(-self.end // 512) * 512
        self.end = start + size
        return self, start, size

    def fault(self, start: int, size: int) -> tuple[int] | None:
        if start not in self.resident:
            if self.loaded_size() + size > Pages.budget:
                return None
            self.turn += 1
            self.resident[start] = self.turn, size
            self.bytes[start : start + size] = 0xA5
        return (self.resident[start][0],)

    def loaded_size(self) -> int:
        return sum(size for _, size in self.resident.values())

    def free_memory(self, size: int) -> int:
        freed = 0
        for start in sorted(self.resident, reverse=True):
            if freed < size:
                freed += self.resident.pop(start)[1]
        return freed


class NoPinnedMemory:
    size = 0

    def __init__(self, *ignored: Any, **more: Any) -> None:
        pass

    def truncate(self, *ignored: Any, **more: Any) -> None:
        pass


def pretend(monkeypatch: Any, budget: int) -> None:
    """Until the test ends ComfyUI has `budget` bytes of dynamic VRAM. Raises ImportError on a host without it."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops
    import comfy.utils
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    from comfy.cli_args import args

    def put(place: Any, **values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(place, name, value)

    def same(one: Any, other: Any) -> bool:
        return one is not None and one == other

    put(Pages, budget=budget)
    put(comfy_aimdo.model_vbar, ModelVBAR=Pages, vbar_fault=lambda slot: slot[0].fault(*slot[1:]))
    put(comfy_aimdo.model_vbar, vbar_unpin=lambda slot: None, vbar_signature_compare=same)
    put(comfy_aimdo.model_vbar, vbars_analyze=lambda *ignored: 0)
    put(comfy_aimdo.torch, aimdo_to_tensor=lambda slot, device: slot[0].bytes[slot[1] : slot[1] + slot[2]])
    put(comfy_aimdo.host_buffer, HostBuffer=NoPinnedMemory)
    put(args, disable_pinned_memory=True)
    put(comfy.model_management, is_device_cpu=lambda device: device.type == "cpu" and device.index is None)
    put(comfy.model_management, get_torch_device=lambda: DEVICE)
    put(comfy.model_management, unet_offload_device=lambda: torch.device("cpu"))
    put(comfy.model_patcher, CoreModelPatcher=comfy.model_patcher.ModelPatcherDynamic)
    put(comfy.memory_management, aimdo_enabled=True)
    put(comfy.utils, load_safetensors=lambda path: (load_file(path), {}))  # else through a mapping of the driver's
    cast = comfy.ops.cast_bias_weight

    def on_the_device(layer: Any, input: Any = None, dtype: Any = None, **more: Any) -> Any:
        if input is not None:
            more["bias_dtype"] = more.get("bias_dtype") or dtype or input.dtype
            dtype = dtype or input.dtype
        more["device"] = DEVICE if hasattr(layer, "_v") else torch.device("cpu")
        return cast(layer, None, dtype=dtype, **more)

    put(comfy.ops, cast_bias_weight=on_the_device)
