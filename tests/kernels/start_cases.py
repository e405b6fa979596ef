"""Run in a process of its own: compiled kernels started in many ways, beside what Triton itself would start.

Prints one line for each launch whose variant is another than Triton's, and `kernels` and `launches` that were right.
"""

import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import fake_gpu

fake_gpu.install()
fake_gpu.become("sm_89")

from triton import knobs  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402

from svdquant_pack.kernels.backends.triton import start  # noqa: E402
from svdquant_pack.kernels.backends.triton.gemv_w4a16 import gemv_w4a16  # noqa: E402

FLAGS = {"BM": 16, "BN": 32, "num_warps": 2, "num_stages": 1}
started = []


def watch() -> None:
    """Record every variant that is started, and by whom."""
    original = CudaLauncher.__call__

    def start(self, *arguments):
        started.append(self)
        return original(self, *arguments)

    CudaLauncher.__call__ = start


def tensors(kind: torch.dtype, ahead: int) -> tuple[torch.Tensor, ...]:
    """Arguments of gemv_w4a16; x begins `ahead` numbers behind an address that is well aligned"""
    scales = torch.zeros(2, 64, dtype=kind)
    return torch.zeros(512, dtype=kind)[ahead:], torch.zeros(64, 64, dtype=torch.int8), scales, scales, scales, scales


def main() -> None:
    watch()
    kinds = list(product((torch.float16, torch.bfloat16), (False, True)))
    launches = {(dtype, bias): start.Launch(gemv_w4a16, {"BIAS": bias, **FLAGS}) for dtype, bias in kinds}
    right = 0
    cases = [(*kind, *case) for kind in kinds for case in product((0, 8, 1), (1, 17), (64, 63), (128, 130))]
    for dtype, bias, ahead, m, n, stride in cases * 2:
        arguments, numbers = tensors(dtype, ahead), (m, n, 128, stride)
        started.clear()
        launches[dtype, bias]((2, 1, 1), arguments, numbers)
        wanted = gemv_w4a16[(2, 1, 1)](*arguments, *numbers, BIAS=bias, **FLAGS)
        found = {id(variant) for variant in started}
        if found == {id(wanted.run)}:
            right += 1
        else:
            print("other variant", dtype, ahead, m, n, stride, bias)
    heard: list[str] = []
    knobs.runtime.launch_enter_hook.add(lambda metadata: heard.append(metadata.get()["name"]))
    launches[kinds[0]]((2, 1, 1), tensors(kinds[0][0], 0), (1, 64, 128, 128))
    if heard != ["gemv_w4a16"]:
        print("a profiler heard", heard)
    print("kernels", len({id(variant.compiled) for variant in start._variants.values()}), "launches", right)


main()
