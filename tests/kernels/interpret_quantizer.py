"""Started by test_gluon_fragments with TRITON_INTERPRET=1: `python interpret_quantizer.py <root of the pack>`."""

import importlib.util
import sys
from itertools import product
from pathlib import Path

import torch


def main() -> None:
    from svdquant_pack.kernels import FORMATS
    from svdquant_pack.kernels.backends.gluon.int4_linear import quantize
    from svdquant_pack.kernels.backends.reference import smooth_activation
    from svdquant_pack.kernels.packing import pack
    from svdquant_pack.tests.kernels.layers import random_layer

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory, as conftest.py says
    for dtype in (torch.float16, torch.float32):  # the interpreter has no bf16 arithmetic
        for act_unsigned, rule in product(((0, 0), (64, 192), (0, 256)), ("absmax", "signed_extreme")):
            layer = random_layer("int4", 32, 256, 16, act_unsigned, centred=rule == "absmax")
            mean = layer.tensors.get("act_mean")
            x = torch.randn(37, 512, generator=torch.Generator().manual_seed(5)).to(dtype)[:, :256]
            x[5, 64:128] = 0
            x[6, 3], x[7, 200], x[8, 130] = torch.nan, torch.inf, -torch.inf
            qact, ascales = quantize(x, layer["smooth_factor"], act_unsigned, rule, mean)
            codes, scales = FORMATS["int4"].quantize_activation(smooth_activation(x, layer, mean), act_unsigned, rule)
            assert torch.equal(ascales.T.nan_to_num(-1), scales.nan_to_num(-1)), (dtype, act_unsigned, rule, "scales")
            finite = scales.isfinite().repeat_interleave(32, 1)
            assert torch.equal(qact[finite], pack(codes)[finite]), (dtype, act_unsigned, rule, "codes")


if __name__ == "__main__":
    conftest = importlib.util.spec_from_file_location("svdquant_conftest", Path(sys.argv[1]) / "tests" / "conftest.py")
    conftest.loader.exec_module(importlib.util.module_from_spec(conftest))
    main()
