"""Record 4-bit weights of bitsandbytes beside what its own `dequantize_4bit` gives for them, on a CPU.

pip install bitsandbytes==0.50.2 && python tests/golden/record_bitsandbytes.py
"""

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

CASES = {  # name: kind, dtype, nested, shape
    "nf4_nested_bf16": ("nf4", torch.bfloat16, True, (128, 192)),
    "nf4_fp16": ("nf4", torch.float16, False, (64, 128)),
    "nf4_fp32_tail": ("nf4", torch.float32, True, (3, 50)),
    "fp4_nested_fp16": ("fp4", torch.float16, True, (64, 128)),
}


def main() -> None:
    file = {}
    for seed, (name, (kind, dtype, nested, shape)) in enumerate(CASES.items()):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        file[f"{name}.weight"] = packed
        file |= {f"{name}.weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
        file[f"decoded.{name}"] = dequantize_4bit(packed, state)
    made = {"made_by": f"bitsandbytes {bitsandbytes.__version__}"}
    save_file(file, Path(__file__).parent / "bitsandbytes.safetensors", made)


if __name__ == "__main__":
    main()
