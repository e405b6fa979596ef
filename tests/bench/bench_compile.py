"""Time until a compiled model gives its first output, 4-bit beside dense, in one process; on the CPU.

    python tests/bench/bench_compile.py [--check] [--model flux] [--backend inductor] [--rounds 1]

The models are those of tests/nodes/zoo.py, compiled by ComfyUI's node TorchCompileModel; without caches on disk, and
with the compiler in this process. Seconds are of the processor, children (the C++ compiler) included. Attention is
torch's own, as on a GPU.

    graphs   how many the compiler was given
    nodes    in all of them
    first    seconds of the first call, of dense and 4-bit in turn; the median
    later    milliseconds of a later call, and of the same without the compiler

--check exits with 1 where 4-bit has more graphs than dense or takes more than 1.5 of its seconds.
"""

import argparse
import resource
import statistics
import sys
import tempfile
from pathlib import Path

from bench_lora import start_host

BOUND = 1.5
CALLS = 7


def seconds() -> float:
    """Of the processor, so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(action) -> float:
    start = seconds()
    action()
    return seconds() - start


def count_graphs(patcher, name: str) -> tuple[int, int]:
    """(graphs, nodes in them)"""
    import torch

    from svdquant_pack.tests.nodes import zoo
    from svdquant_pack.tests.nodes.test_compile import Graphs, compiled

    torch._dynamo.reset()
    graphs = Graphs()
    zoo.forward_wrapped(compiled(patcher, graphs), name)
    return len(graphs), sum(len(graph.graph.nodes) for graph in graphs)


def first_call(patcher, name: str, backend: str) -> tuple[float, float]:
    """(seconds of the first call, milliseconds of a later one)"""
    import torch

    from svdquant_pack.tests.nodes import zoo
    from svdquant_pack.tests.nodes.test_compile import compiled

    torch._dynamo.reset()
    made = compiled(patcher, backend)
    first = timed(lambda: zoo.forward_wrapped(made, name))
    return first, later(made, name)


def later(patcher, name: str) -> float:
    from svdquant_pack.tests.nodes import zoo

    return 1e3 * statistics.median(timed(lambda: zoo.forward_wrapped(patcher, name)) for _ in range(CALLS))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model", default="flux")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    start_host()
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True  # read when attention is imported
    import torch._inductor.config as inductor

    from svdquant_pack.nodes.host.model import load_model, load_pinned_model
    from svdquant_pack.quantize.files.source import FileSource
    from svdquant_pack.quantize.maker.model import quantize_model
    from svdquant_pack.quantize.recipe import Recipe
    from svdquant_pack.tests.nodes import zoo

    inductor.force_disable_caches, inductor.compile_threads = True, 1
    with tempfile.TemporaryDirectory() as folder:
        source, made = (Path(folder) / f"{kind}.safetensors" for kind in ("dense", "4bit"))
        quantize_model(FileSource(zoo.save(options.model, source)), made, Recipe(rank=16, alternations=1))
        models = {"dense": load_pinned_model(str(source)), "4bit": load_model(str(made))}
        plain = {kind: later(patcher, options.model) for kind, patcher in models.items()}
        graphs = {kind: count_graphs(patcher, options.model) for kind, patcher in models.items()}
        rounds = [
            {kind: first_call(patcher, options.model, options.backend) for kind, patcher in models.items()}
            for _ in range(options.rounds)
        ]
    print(f"{options.model}, {options.backend}")
    first = {kind: statistics.median(each[kind][0] for each in rounds) for kind in models}
    for kind in models:
        then = statistics.median(each[kind][1] for each in rounds)
        print(
            f"{kind:6s}{graphs[kind][0]:4d} graphs{graphs[kind][1]:6d} nodes{first[kind]:8.1f} s first"
            f"{then:8.1f} ms later{plain[kind]:8.1f} ms without"
        )
    ratio = first["4bit"] / first["dense"]
    print(f"4-bit takes {ratio:.2f} of dense's time to compile, at most {BOUND}")
    missed = ratio > BOUND or graphs["4bit"][0] > graphs["dense"][0]
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
