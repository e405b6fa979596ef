"""Run in a process of its own: which compiled variants a model needs, by Triton's own host code, without a GPU.

A line of JSON for each model, format and GPU; with the argument `host`, what a prepared call does beside starting
kernels. Nothing is compiled: Triton's binder says which variant a launch is, and the compiler is told to do nothing.
Tensors are of the real sizes and have no memory.
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import fake_gpu

fake_gpu.install()

from triton.runtime.jit import JITFunction  # noqa: E402

from svdquant_pack.kernels import FORMATS, Layer, LayerSpec, Lora, computes_of, dispatch  # noqa: E402
from svdquant_pack.kernels.backends.gluon import int4_linear, verify  # noqa: E402
from svdquant_pack.kernels.backends.triton import launch, tiles  # noqa: E402
from svdquant_pack.kernels.first_use import rows_of  # noqa: E402
from svdquant_pack.kernels.layer import RANK_TILE  # noqa: E402
from svdquant_pack.kernels.modes import MEASURED  # noqa: E402
from svdquant_pack.kernels.self_test import LORAS, sample_of  # noqa: E402

META, GPU = torch.device("meta"), torch.device("cuda")
ROWS = (16, 17, 77, 154, 333, 4608)
GELU, SECOND, NO_BIAS = "behind a GELU", "half behind a GELU", "no bias"
RANK = 32
# model -> {layer: (N, K, kind)}
MODELS: dict[str, dict[str, tuple[int, int, str]]] = {
    "flux": {
        "qkv": (9216, 3072, ""),
        "proj": (3072, 3072, ""),
        "mlp.0": (12288, 3072, ""),
        "mlp.2": (3072, 12288, GELU),
        "linear1": (21504, 3072, ""),
        "linear2": (3072, 15360, SECOND),
        "modulation": (18432, 3072, "awq"),
        "single.modulation": (9216, 3072, "awq"),
    },
    "qwen_image": {
        "to_q": (3072, 3072, ""),
        "mlp.0": (12288, 3072, ""),
        "mlp.2": (3072, 12288, GELU),
        "modulation": (18432, 3072, "awq"),
    },
    "sdxl": {
        "ff.0": (10240, 1280, ""),
        "ff.2": (1280, 5120, ""),
        "to_q": (1280, 1280, NO_BIAS),
        "to_out": (1280, 1280, ""),
        "small.ff.0": (5120, 640, ""),
        "small.ff.2": (640, 2560, ""),
        "small.to_q": (640, 640, NO_BIAS),
        "small.to_out": (640, 640, ""),
    },
    "z_image": {
        "qkv": (11520, 3840, NO_BIAS),
        "out": (3840, 3840, NO_BIAS),
        "w1": (10240, 3840, NO_BIAS),
        "w2": (3840, 10240, NO_BIAS),
    },
}


def layer(format: str, shape: tuple[int, int, str], dtype: torch.dtype, means: bool) -> Layer:
    """A layer as files have it, without memory."""
    n, k, kind = shape
    if kind == "awq":
        spec = LayerSpec("awq_w4a16", n, k)
    else:
        unsigned = (0, k) if kind == GELU else (n, k) if kind == SECOND else (0, 0)
        spec = LayerSpec(format, n, k, RANK, unsigned if FORMATS[format].unsigned_act else (0, 0))
    parts = spec.fmt.parts(n, k, spec.rank)
    wanted = [name for name, part in parts.items() if not part.optional or (means and name in ("act_mean", "out_mean"))]
    return without_memory(
        spec, {name: dtype if dtype in parts[name].dtypes else parts[name].dtypes[0] for name in wanted}
    )


def without_memory(spec: LayerSpec, kinds: dict[str, torch.dtype]) -> Layer:
    """A layer with tensors of these types"""
    parts = spec.fmt.parts(spec.n, spec.k, spec.rank)
    tensors = {name: torch.empty(parts[name].shape, dtype=kind, device=META) for name, kind in kinds.items()}
    for name, width in spec.fmt.by_column.items():
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].new_empty(columns, -(-rows // width) * width).t()[:rows]
    return Layer(spec, tensors)


class Recorder:
    """The variants that Triton was asked for: (kernel, compile-time arguments, Triton's key)."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, str]] = set()

    def __call__(self, kernel, key, signature, *rest) -> None:
        constexprs = next(each for each in rest if isinstance(each, dict))
        names = list(kernel.arg_names)
        constants = {names[path[0]]: value for path, value in constexprs.items()}
        plain = {name: value for name, value in constants.items() if not name.endswith("_desc")}
        self.seen.add((kernel.__name__, str(plain), str(key)))


recorder = Recorder()
JITFunction._do_compile = lambda *call: recorder(*call)


def pretend(arch: str) -> None:
    capability = fake_gpu.CAPABILITIES[arch]
    fake_gpu.become(arch)
    for module in (tiles, launch):
        module.arch_of = lambda device: arch
    dispatch.arch_of = lambda device: (arch, capability)
    int4_linear._is_turing = lambda device: arch == "sm_75"
    verify.once = lambda *arguments: None


def run(made: Layer, biased: bool, lora_rank: int, rows: int, dtype: torch.dtype) -> None:
    """One call by what is chosen for it, if that is a compiled kernel."""
    spec = made.spec
    choice = dispatch._choose(spec, GPU, dtype, "auto", dispatch.bucket(rows), dispatch.known_fault)
    if choice.backend.name == "reference":
        return
    there = Layer.known(spec, made.tensors, choice.backend.order(spec, choice.compute))
    x, bias, lora = (torch.empty(size, dtype=dtype, device=META) for size in ((rows, spec.k), spec.n, 0))
    if lora_rank:
        down, up = (torch.empty(size, lora_rank, dtype=dtype, device=META) for size in (spec.k, spec.n))
        lora = Lora(down, up, torch.empty(lora_rank // RANK_TILE, device=META))
    call = x, there, bias if biased else None, lora if lora_rank else None
    choice.backend.prepare(*call, choice.compute, "")(*call)


def variants(model: str, format: str, arch: str, means: bool) -> dict[str, Any]:
    """What one model needs on one GPU, and what is compiled while it loads"""
    pretend(arch)
    dtype = torch.float16 if arch == "sm_75" else torch.bfloat16
    layers = [(layer(format, shape, dtype, means), shape[2] != NO_BIAS) for shape in MODELS[model].values()]
    needed: list[set[tuple[str, str, str]]] = []
    for lora_rank in (0, 16, 64):
        recorder.seen = set()
        for made, biased in layers:
            low_rank = made.spec.fmt.low_rank
            for rows in ROWS if low_rank else (1, 2, 4):
                run(made, biased, lora_rank if low_rank else 0, rows, dtype)
        needed.append(recorder.seen)
    recorder.seen = set()
    tried = {sample_of(made.spec, {n: t.dtype for n, t in made.tensors.items()}, biased) for made, biased in layers}
    for sample in tried:
        made, low_rank = without_memory(sample.spec, dict(sample.kinds)), sample.spec.fmt.low_rank
        for rows, lora_rank in product(rows_of(sample), (0, *LORAS) if low_rank else (0,)):
            run(made, sample.biased, lora_rank, rows, dtype)
    return {
        "case": f"{model} {format} {arch}" + " with means" * means,
        "kernels": sorted(each[:2] for each in needed[0]),
        "left for a first LoRA": sorted({each[:2] for found in needed for each in found - recorder.seen}),
        "while loading": sorted(each[:2] for each in recorder.seen),
        "left for the first call": sorted({each[:2] for each in needed[0] - recorder.seen}),
    }


class OnThe(TorchDispatchMode):
    """Notes every operation that has to do with a tensor of another device, or hands a number to Python."""

    def __init__(self, device: torch.device, notes: set[str]) -> None:
        super().__init__()
        self.device, self.notes = device, notes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        places = {each.device for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)}
        if places - {self.device} or function in READ_BY_THE_HOST:
            self.notes.add(f"{function} on {', '.join(sorted(map(str, places)))}")
        return result


READ_BY_THE_HOST = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)


def host_work(format: str, arch: str) -> dict[str, Any]:
    """{route: what a prepared call does, after the first, that a CUDA graph could not hold}"""
    pretend(arch)
    dtype = torch.float16 if arch == "sm_75" else torch.bfloat16
    routes: dict[str, set[str]] = {}
    kinds = ["awq"] if format == "awq_w4a16" else ["", SECOND]
    for kind, means, rows, compute in product(
        kinds, (False, True), (5, 1000), sorted({*computes_of(format)} - {MEASURED})
    ):
        made = layer(format, (128, 256, kind), dtype, means)
        spec = made.spec
        try:
            choice = dispatch._choose(spec, GPU, dtype, compute, dispatch.bucket(rows), dispatch.known_fault)
        except ValueError:
            continue  # not there
        if choice.backend.name == "reference":
            continue
        x, bias = (torch.empty(size, dtype=dtype, device=META) for size in ((rows, spec.k), spec.n))
        down, up = (torch.empty(size, 32, dtype=dtype, device=META) for size in (spec.k, spec.n))
        for lora in (None, Lora(down, up, torch.empty(2, device=META))) if spec.fmt.low_rank else (None,):
            notes = routes.setdefault(f"{choice.backend.name} {choice.compute}", set())
            order = choice.backend.order(spec, choice.compute)
            resident = Layer.known(spec, made.tensors, order)
            call = choice.backend.prepare(x, resident, bias, lora, choice.compute, "")
            call(x, resident, bias, lora)
            with OnThe(META, notes):
                call(x, resident, bias, lora)
                call(x, Layer.known(spec, made.tensors, order), bias, lora)  # streamed
    return {"arch": arch, "format": format, "routes": {route: sorted(notes) for route, notes in routes.items()}}


def main() -> None:
    if sys.argv[1:] == ["host"]:
        for format, arch in product(FORMATS, ("sm_75", "sm_80", "sm_89", "sm_90", "sm_120")):
            print(json.dumps(host_work(format, arch)), flush=True)
        return
    for model, format, arch in product(MODELS, ("int4", "nvfp4"), fake_gpu.CAPABILITIES):
        for means in (False, True) if model == "qwen_image" else (False,):
            print(json.dumps(variants(model, format, arch, means)), flush=True)


if __name__ == "__main__":
    main()
