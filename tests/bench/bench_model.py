"""Time of a FLUX.1 single block at real size in ComfyUI's own class, 4-bit beside 16-bit, on the CPU.

    python tests/bench/bench_model.py [--check] [--tokens 512] [--threads 1]

The block has random weights. The 4-bit one computes as `auto` chooses; its modulation is awq_w4a16, as files have it.
The dense ones hold the decoded weights, in bf16 and in float32, and are ComfyUI's own layers. Times are of the process,
the least of several runs taken in turn; nothing is timed before the 4-bit block's result was compared with the dense
one's. --check exits with 1 where the 4-bit block takes more than 0.75 of the faster dense one.
"""

import argparse
import sys
import time
from collections.abc import Callable

import bench_lora
import torch

HIDDEN, HEADS, RANK, RUNS = 3072, 24, 32, 5
BOUND = 0.75
RIGHT = 0.05  # relative error against the dense block: rounding alone, no scale or branch can be wrong


def layer_of(n: int, k: int, format: str, generator: torch.Generator):
    """A 4-bit layer of random weights, whose branch carries a tenth of its output."""
    from svdquant_pack.kernels import FORMATS, Layer, LayerSpec

    fmt = FORMATS[format]
    tensors = dict(fmt.encode_weight(torch.randn(n, k, generator=generator) / k**0.5, torch.bfloat16))
    if not fmt.low_rank:
        return Layer(LayerSpec(format, n, k), tensors)
    tensors["smooth_factor"] = torch.ones(k, dtype=torch.bfloat16)
    tensors["proj_down"] = (torch.randn(k, RANK, generator=generator) / k**0.5).bfloat16()
    tensors["proj_up"] = (0.1 * torch.randn(n, RANK, generator=generator) / RANK**0.5).bfloat16()
    return Layer(LayerSpec(format, n, k, RANK), tensors)


def blocks() -> tuple[torch.nn.Module, dict[torch.dtype, torch.nn.Module]]:
    """(4-bit block, dense blocks of the same weights by dtype)."""
    import comfy.ops
    from comfy.ldm.flux.layers import SingleStreamBlock

    from svdquant_pack.nodes.host.linear import SVDQuantLinear
    from svdquant_pack.quantize.linear import PackedLinear

    operations = type("Operations", (comfy.ops.manual_cast,), {"Linear": SVDQuantLinear})
    generator = torch.Generator().manual_seed(0)
    packed = SingleStreamBlock(HIDDEN, HEADS, dtype=torch.bfloat16, operations=operations)
    dense = {
        dtype: SingleStreamBlock(HIDDEN, HEADS, dtype=dtype, operations=comfy.ops.disable_weight_init)
        for dtype in (torch.bfloat16, torch.float32)
    }
    torch.nn.init.ones_(packed.norm.query_norm.scale)
    torch.nn.init.ones_(packed.norm.key_norm.scale)
    for name, format in (("linear1", "int4"), ("linear2", "int4"), ("modulation.lin", "awq_w4a16")):
        module = packed.get_submodule(name)
        layer = layer_of(module.out_features, module.in_features, format, generator)
        blob, description = PackedLinear.pack(layer)
        module.take(description, blob)
        weight = layer.dense_weight()
        for block in dense.values():
            block.get_submodule(name).weight.data.copy_(weight)
            torch.nn.init.zeros_(block.get_submodule(name).bias)
    for block in dense.values():
        block.norm.load_state_dict(packed.norm.state_dict())
    return packed, dense


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    bench_lora.start_host()
    torch.set_num_threads(options.threads)
    from comfy.ldm.flux.layers import EmbedND

    packed, dense = blocks()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, options.tokens, HIDDEN, generator=generator)
    vec = torch.randn(1, HIDDEN, generator=generator)
    places = torch.arange(options.tokens).view(1, -1, 1).expand(1, -1, 3).float()
    pe = EmbedND(HIDDEN // HEADS, 10000, [16, 56, 56])(places)

    def run(block: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        return block(x.to(dtype).clone(), vec.to(dtype), pe)

    ways = {
        "4-bit": lambda: run(packed, torch.bfloat16),
        "16-bit, bf16": lambda: run(dense[torch.bfloat16], torch.bfloat16),
        "16-bit, fp32": lambda: run(dense[torch.float32], torch.float32),
    }
    with torch.inference_mode():
        wanted = ways["16-bit, fp32"]()
        error = ((ways["4-bit"]().float() - wanted).norm() / wanted.norm()).item()
        print(f"relative error of the 4-bit block against the dense one: {error:.4f}")
        if not error < RIGHT:
            print(f"the 4-bit block is wrong: nothing is timed, allowed are {RIGHT}")
            return 1
        times = {name: min(seconds(way) for _ in range(RUNS)) for name, way in ways.items()}
    least = min(taken for name, taken in times.items() if name != "4-bit")
    for name, taken in times.items():
        print(f"{name:14} {1e3 * taken:8.1f} ms of the process  {taken / least:5.2f} of the faster dense block")
    missed = times["4-bit"] > BOUND * least
    print(f"{'MISSED: ' if missed else ''}4-bit takes {times['4-bit'] / least:.2f}, bound {BOUND}")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
