"""Run in a process of its own: layers of rank 32 on few rows and many, without a LoRA, then with ever wider ones.

Prints the width of the LoRA and how many kernels have been compiled by then.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import fake_gpu

fake_gpu.install()
fake_gpu.become("sm_89")

from svdquant_pack.kernels.backends.triton import launch, layers, start, tiles  # noqa: E402
from svdquant_pack.kernels.layer import Lora  # noqa: E402
from svdquant_pack.tests.kernels.layers import random_layer  # noqa: E402


def main() -> None:
    for module in (tiles, launch):
        module.arch_of = lambda device: "sm_89"
    layer = random_layer("int4", n=64, k=128, rank=32, dtype=torch.bfloat16)
    for width in (0, 16, 32, 96, 48, 128):
        for rows in (4, 600):
            x = torch.zeros(rows, 128, dtype=torch.bfloat16)
            lora = Lora(x.new_zeros(128, width), x.new_zeros(64, width)) if width else None
            for strength in (None, torch.ones(width // 16)):
                like = None if lora is None else lora._replace(strength=strength)
                layers.prepare(x, layer, None, like, "w4a4", "")(x, layer, None, like)
        print(width, len({id(variant.compiled) for variant in start._variants.values()}))


main()
