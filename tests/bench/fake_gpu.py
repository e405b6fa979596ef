"""Triton's whole host side without a GPU: its own driver module, on a libcuda whose functions do nothing.

Kernels are compiled for the GPU that is named, launches go through Triton's own binder, cache and launcher in C, and
end in a `cuLaunchKernelEx` that returns. Tensors stay on the CPU; nothing in them is computed.
"""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIBCUDA = r"""
#include <stdint.h>
#define NOTHING(name) int name() { return 0; }
#define ONE(name) int name(void **out) { *out = (void *)1; return 0; }
NOTHING(cuLaunchKernelEx) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuCtxGetLimit)
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuOccupancyMaxActiveClusters) NOTHING(cuInit) NOTHING(cuModuleUnload) NOTHING(cuStreamIsCapturing)
NOTHING(cuTensorMapEncodeIm2col)
ONE(cuCtxGetCurrent) ONE(cuDevicePrimaryCtxRetain) ONE(cuModuleLoadData) ONE(cuModuleGetFunction)
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int *value) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value) { *value = 1024; return 0; }
int cuPointerGetAttribute(uint64_t *found, int attribute, uint64_t pointer) { *found = pointer; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "none"; return 0; }
"""
CAPABILITIES = {
    "sm_75": (7, 5),
    "sm_80": (8, 0),
    "sm_86": (8, 6),
    "sm_89": (8, 9),
    "sm_90": (9, 0),
    "sm_100": (10, 0),
    "sm_120": (12, 0),
}
MULTIPROCESSORS = 132
_current = 0  # the index of a capability: Triton compiles anew for each


def install() -> None:
    """Put the libcuda in the place of the system's, for this process, and make Triton's driver believe in it."""
    folder = Path(tempfile.mkdtemp())
    library = folder / "libcuda.so.1"
    (folder / "cuda.c").write_text(LIBCUDA)
    command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", "-o", str(library), "cuda.c"]
    subprocess.run(command, cwd=folder, check=True)
    (folder / "libcuda.so").symlink_to(library)  # the name that older ones link to
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # whoever asks for this name later is given this one
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")  # a launcher for this library is of no use to others
    import torch
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=None: list(CAPABILITIES.values())[_current]
            self.get_current_device = lambda: _current
            self.get_current_stream = lambda device: 0

        def get_active_torch_device(self) -> Any:
            return torch.device("cpu")

    driver.set_active(Driver())
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=MULTIPROCESSORS)


def become(arch: str) -> None:
    """From now on the current GPU is of this kind."""
    global _current
    _current = list(CAPABILITIES).index(arch)
