"""Time of the host for one layer, from `module(x)` to the driver, against ComfyUI's own layer in the same process.

    COMFYUI_PATH=... python tests/bench/bench_host.py [--check] [--only NAME ...] [--profile NAME] [--calls 2000]

M = 4, K = N = 256, bf16. Every route runs Triton's own host code to the end, only the functions of the CUDA driver do
nothing (fake_gpu.py), and tensors lie on the CPU. The layer and the host's `manual_cast.Linear` take turns, so that
each finds the processor's caches as another layer left them; figures are medians.

    us, host  the pack's layer and the host's, whose product is computed on this CPU
    floor     the host's without its product, which on a GPU is one more launch
    lora      with a LoRA of rank 16 at strength 0.8, which costs the host's layer nothing: it is merged into its weight
    streamed  bytes are new in each call, as under offloading, for the host's layer as well

The first ratio is us / host, what is asked for; the second, us / floor, is what is left of it where a product takes no
time of the host's. `cpu` and `reference` compute on this CPU from end to end, so that little of their time is the
host's. No host streams a layer there, whose bytes are its own: their `streamed` is what expanding the weight costs.
`--check` exits with 1 where a route takes more than 1.5 times the host's layer.
"""

import argparse
import contextlib
import cProfile
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
import fake_gpu
from bench_lora import start_host

M, N, K, RANK, LORA_RANK = 4, 256, 256, 32, 16
TARGET = 1.5
CASES = ("plain", "lora", "streamed")


@dataclass(frozen=True)
class Route:
    """A way through the pack; `arch` is None for what runs on the CPU itself."""

    format: str
    backend: str
    compute: str
    arch: str | None

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.format, self.compute, self.backend, self.arch)))


ROUTES = (
    Route("int4", "triton", "w4a4", "sm_89"),
    Route("int4", "triton", "w4a8", "sm_120"),
    Route("int4", "triton", "w4a8-jit", "sm_80"),
    Route("int4", "triton", "w8a8", "sm_80"),
    Route("int4", "gluon", "w4a4", "sm_89"),
    Route("int4", "gluon", "w4a8-jit", "sm_90"),
    Route("nvfp4", "triton", "w4a4", "sm_120"),
    Route("nvfp4", "gluon", "w4a8-jit", "sm_90"),
    Route("awq_w4a16", "triton", "w4a16", "sm_89"),
    Route("int4", "reference", "w4a4", None),
    Route("int4", "cpu", "w8a8", None),
)


def layers(route: Route):
    """(the pack's layer, the host's, the host's without its product)"""
    import comfy.ops
    import torch

    from svdquant_pack.kernels.backends import discover
    from svdquant_pack.kernels.layer import Layer, LayerSpec
    from svdquant_pack.nodes.host.linear import SVDQuantLinear
    from svdquant_pack.quantize.linear import PackedLinear

    dtype, low_rank = torch.bfloat16, route.format != "awq_w4a16"
    spec = LayerSpec(route.format, N, K, RANK if low_rank else 0)
    tensors = dict(spec.fmt.encode_weight(torch.randn(N, K) / K**0.5, dtype))
    if low_rank:
        tensors["smooth_factor"] = torch.rand(K).to(dtype) + 0.5
        tensors["proj_down"], tensors["proj_up"] = (torch.randn(size, RANK).to(dtype) / 16 for size in (K, N))
    ours = SVDQuantLinear(K, N, True, device="cpu", dtype=dtype)
    blob, packed = PackedLinear.pack(Layer(spec, tensors), "auto" if route.compute == "w4a16" else route.compute)
    ours.take(packed, blob)
    ours.arrange(discover()[0][route.backend].order(spec, route.compute), blob.device)
    dense = comfy.ops.manual_cast.Linear(K, N, True, device="cpu", dtype=dtype).requires_grad_(False)
    for layer in (ours, dense):
        layer.bias.data.zero_()
    torch.nn.init.normal_(dense.weight)  # what lies in new memory may be slow to multiply

    class Floor(comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, x):
            weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
            y = x.new_empty(*x.shape[:-1], weight.shape[0])
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return y

    floor = Floor(K, N, True, device="cpu", dtype=dtype).requires_grad_(False)
    floor.load_state_dict(dense.state_dict())
    return ours, dense, floor


def lora():
    import torch

    from svdquant_pack.quantize.lora.deltas import Columns
    from svdquant_pack.quantize.lora.loras import LayerLoras

    factors = (torch.randn(size, LORA_RANK).bfloat16() / 16 for size in (K, N))
    return LayerLoras((Columns(*factors),), (0.8,))


@contextlib.contextmanager
def on(route: Route) -> Iterator[None]:
    """Inside, this route is what the dispatch chooses."""
    from svdquant_pack.kernels import dispatch
    from svdquant_pack.kernels.backends import discover

    choose, backend = dispatch._choose, discover()[0][route.backend]
    # the mode that the layer asks for: one that streams may ask for another than the route's
    asked = lambda mode: route.compute if mode == "auto" else mode  # noqa: E731
    dispatch._choose = lambda spec, device, dtype, mode, rows: dispatch.Choice(backend, asked(mode), {})
    dispatch._chosen.clear()
    if route.arch is not None:
        _pretend(route.arch)
    try:
        yield
    finally:
        dispatch._choose = choose


def _pretend(arch: str) -> None:
    from svdquant_pack.kernels.backends.gluon import int4_linear, verify
    from svdquant_pack.kernels.backends.triton import launch, tiles

    fake_gpu.become(arch)
    for module in (tiles, launch):
        module.arch_of = lambda device: arch
    getattr(tiles, "settings_of", tiles.table).cache_clear()
    int4_linear._is_turing = lambda device: False
    verify.once = lambda *arguments: None  # it would compare numbers, and none are computed


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """Inside, the host hands every layer a copy of its bytes."""
    import comfy.ops

    cast = comfy.ops.cast_bias_weight

    def fresh(*arguments, **keywords):
        weight, *rest = cast(*arguments, **keywords)
        return weight.clone(), *rest

    comfy.ops.cast_bias_weight = fresh
    try:
        yield
    finally:
        comfy.ops.cast_bias_weight = cast


def medians(calls: int, *functions: Callable[[], object]) -> list[float]:
    """Microseconds of this thread in each, in turns: what others run on the machine does not count."""
    for _ in range(20):
        for function in functions:
            function()
    times: list[list[int]] = [[] for _ in functions]
    for _ in range(calls):
        for found, function in zip(times, functions, strict=True):
            start = time.thread_time_ns()
            function()
            found.append(time.thread_time_ns() - start)
    return [statistics.median(found) / 1000 for found in times]


def measure(route: Route, case: str, calls: int) -> tuple[float, float, float]:
    """Microseconds of (the pack's layer, the host's, the host's without its product)"""
    import torch

    with on(route), torch.inference_mode(), streaming() if case == "streamed" else contextlib.nullcontext():
        ours, dense, floor = layers(route)
        if case == "lora":
            ours.set_loras(lora())
        x = torch.randn(1, M, K).bfloat16()
        found = medians(calls, lambda: ours(x), lambda: dense(x), lambda: floor(x))
    return found[0], found[1], found[2]


def profile(route: Route, calls: int) -> None:
    import torch

    with on(route), torch.inference_mode():
        ours, *_ = layers(route)
        ours.set_loras(lora())
        x = torch.randn(1, M, K).bfloat16()
        medians(20, lambda: ours(x))
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(calls):
            ours(x)
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="routes whose name contains one of these")
    parser.add_argument("--profile", metavar="NAME", help="where the time of a route goes, instead")
    arguments = parser.parse_args()
    fake_gpu.install()
    start_host()
    from svdquant_pack.kernels.backends import cpu

    routes = [route for route in ROUTES if route.backend != "cpu" or cpu.exact() is None]
    if arguments.profile:
        profile(next(route for route in routes if arguments.profile in route.name), arguments.calls)
        return 0
    missed = 0
    print(f"{'route':28} {'case':9} {'us':>7} {'host':>7} {'ratio':>6} {'floor':>7} {'ratio':>6}")
    for route in routes:
        if arguments.only and not any(name in route.name for name in arguments.only):
            continue
        for case in CASES:
            if case == "lora" and route.format == "awq_w4a16":
                continue  # no LoRA reaches these layers' kernel
            us, host, floor = measure(route, case, arguments.calls)
            missed += us > TARGET * host
            times = f"{us:7.1f} {host:7.1f} {us / host:6.2f} {floor:7.1f} {us / floor:6.2f}"
            print(f"{route.name:28} {case:9} {times}", flush=True)
    return int(bool(arguments.check and missed))


if __name__ == "__main__":
    sys.exit(main())
