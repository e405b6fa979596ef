"""Time to apply a LoRA to the layers of FLUX.1 in real size, beside the host's own way on 16-bit weights; on the CPU.

    python tests/bench/bench_lora.py [--check] [--rank 16] [--doubles 19] [--singles 38]

The layers have random 4-bit weights; equal shapes share one block of bytes, so that the whole set fits into 8 GB.

    apply      LoRA file -> factors in the compute dtype for all layers, by ModelPatcher.partially_load
    strength   the same file at another strength, by ModelPatcher.partially_load
    host       the same patches on the decoded bf16 weights: calculate_weight in fp32, rounded back to bf16

--check exits with 1 where a figure is missed: apply at most 0.1 of host, strength at most 0.01 of apply, and the error
of every kind of LoRA against the dense weight at most 1e-5 where it is exact, else at most what is stated.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = {"apply": 0.1, "strength": 0.01}
EXACT = 1e-5
HIDDEN = 3072
DOUBLE = {
    "attn.qkv": (3 * HIDDEN, HIDDEN),
    "attn.proj": (HIDDEN, HIDDEN),
    "mlp.0": (4 * HIDDEN, HIDDEN),
    "mlp.2": (HIDDEN, 4 * HIDDEN),
}
SINGLE = {"linear1": (7 * HIDDEN, HIDDEN), "linear2": (HIDDEN, 5 * HIDDEN)}


def start_host() -> None:
    """Make the pack and the host importable, as the tests do."""
    for name, path in (("tests_conftest", "conftest.py"), ("nodes_conftest", "nodes/conftest.py")):
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if module.MISSING:
        sys.exit(module.MISSING)


def layers_of(doubles: int, singles: int) -> dict[str, tuple[int, int]]:
    """layer name -> (N, K)"""
    found = {}
    for block in range(doubles):
        for stream in ("img", "txt"):
            found |= {f"double_blocks.{block}.{stream}_{name}": shape for name, shape in DOUBLE.items()}
    for block in range(singles):
        found |= {f"single_blocks.{block}.{name}": shape for name, shape in SINGLE.items()}
    return found


def build(shapes: dict[str, tuple[int, int]]):
    """(ModelPatcher of 4-bit layers, shape -> dense bf16 weight)."""
    import torch
    from comfy.model_patcher import ModelPatcher

    from svdquant_pack.kernels.layer import Layer, LayerSpec
    from svdquant_pack.nodes.host.linear import SVDQuantLinear
    from svdquant_pack.nodes.host.patcher import adopt
    from svdquant_pack.quantize.linear import PackedLinear

    blobs, dense = {}, {}
    for n, k in sorted(set(shapes.values())):
        spec = LayerSpec("int4", n, k, 32)
        tensors = {
            "qweight": torch.randint(-128, 128, (n, k // 2), dtype=torch.int8),
            "wscales": torch.full((k // 64, n), 0.01, dtype=torch.bfloat16),
            "smooth_factor": torch.ones(k, dtype=torch.bfloat16),
            "proj_down": 0.01 * torch.randn(k, 32, dtype=torch.bfloat16),
            "proj_up": 0.01 * torch.randn(n, 32, dtype=torch.bfloat16),
        }
        layer = Layer(spec, {name: tensors[name] for name in spec.fmt.parts(n, k, 32) if name in tensors})
        blobs[n, k] = PackedLinear.pack(layer, "w16")
        dense[n, k] = layer.dense_weight().bfloat16()
    model = torch.nn.Module()
    model.diffusion_model = torch.nn.Module()
    for name, (n, k) in shapes.items():
        parent = model.diffusion_model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        module = SVDQuantLinear(k, n, bias=False)
        blob, packed = blobs[n, k]
        module.take(packed, blob)
        parent.add_module(last, module)
    model.get_dtype = lambda: torch.bfloat16
    model.manual_cast_dtype = None
    return adopt(ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))), dense


def write_lora(shapes: dict[str, tuple[int, int]], rank: int, path: Path) -> None:
    """A LoRA of this rank in bf16 for every layer."""
    import torch
    from safetensors.torch import save_file

    file = {}
    for name, (n, k) in shapes.items():
        for part, shape in (("lora_up", (n, rank)), ("lora_down", (rank, k))):
            file[f"{name}.{part}.weight"] = 0.01 * torch.randn(*shape, dtype=torch.bfloat16)
        file[f"{name}.alpha"] = torch.tensor(float(rank))
    save_file(file, path)


def read_lora(shapes: dict[str, tuple[int, int]], path: Path) -> dict:
    """The file as patches, the way the host reads it."""
    import comfy.lora
    import comfy.utils

    keys = {name: f"diffusion_model.{name}.weight" for name in shapes}
    return comfy.lora.load_lora(comfy.utils.load_torch_file(str(path), safe_load=True), keys)


def timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(shapes: dict[str, tuple[int, int]], rank: int) -> dict[str, float]:
    """Seconds of apply, strength and host."""
    import comfy.float
    import comfy.lora
    import torch

    patcher, dense = build(shapes)
    cpu, patched = torch.device("cpu"), [patcher.clone() for _ in range(6)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        write_lora(shapes, rank, path)
        found = []
        read = timed(lambda: found.append(read_lora(shapes, path)))
    for index, model in enumerate(patched):
        model.add_patches(found[0], 0.5 + 0.1 * index)

    def materialize() -> None:
        for module in patcher.packed_layers().values():
            if module._loaded is None:
                module._loaded = module.loras.on(cpu, torch.bfloat16)

    def show(model) -> None:
        model.partially_load(cpu, 1e32)
        materialize()

    patcher.partially_load(cpu, 1e32)
    seconds = {"apply": read + timed(lambda: show(patched[0]))}
    seconds["strength"] = min(timed(lambda model=model: show(model)) for model in patched[1:])

    def host() -> None:
        for key, entries in patched[0].patches.items():
            weight = dense[shapes[key.removeprefix("diffusion_model.").removesuffix(".weight")]]
            new = comfy.lora.calculate_weight(entries, weight.to(torch.float32, copy=True), key)
            comfy.float.stochastic_rounding(new, weight.dtype, seed=0)

    seconds["host"] = timed(host)
    return seconds


def errors_by_kind() -> list[tuple[str, float, float]]:
    """(kind, ||W' - W'_host|| / ||W'_host - W||, bound) on one layer of a real width."""
    import comfy.lora

    from svdquant_pack.tests.nodes.lora_files import EXACT_KINDS, KINDS, tensors_of

    patcher, _ = build({"layer": (HIDDEN, HIDDEN)})
    key = "diffusion_model.layer.weight"
    (module,) = patcher.packed_layers().values()
    base, rows = module.packed.layer(module.weight).dense_weight(), []
    for kind in KINDS:
        file = {f"layer.{name}": tensor for name, tensor in tensors_of(kind, base, 0).items()}
        patched, notes = patcher.clone(), {}
        patched.add_patches(comfy.lora.load_lora(file, {"layer": key}), 0.8)
        found = patched.layer_loras(notes=notes)[key].dense_weight(base)
        wanted = comfy.lora.calculate_weight(patched.patches[key], base.clone(), key)
        lost = 1 - min(note.kept for note in notes[key])
        bound = EXACT if kind in EXACT_KINDS else max(lost**0.5, 1e-3)
        rows.append((kind, ((found - wanted).norm() / (wanted - base).norm()).item(), bound))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--doubles", type=int, default=19)
    parser.add_argument("--singles", type=int, default=38)
    options = parser.parse_args()
    start_host()
    shapes = layers_of(options.doubles, options.singles)
    missed = []
    weights = sum(n * k for n, k in shapes.values()) / 1e9
    print(f"{len(shapes)} layers, {weights:.2f} G weights, LoRA of rank {options.rank}")
    seconds = measure(shapes, options.rank)
    ratios = {"apply": seconds["apply"] / seconds["host"], "strength": seconds["strength"] / seconds["apply"]}
    print(f"host      {seconds['host']:8.3f} s")
    print(f"apply     {seconds['apply']:8.3f} s  {ratios['apply']:.4f} of host, at most {BOUNDS['apply']}")
    print(f"strength  {seconds['strength']:8.4f} s  {ratios['strength']:.4f} of apply, at most {BOUNDS['strength']}")
    missed += [name for name, bound in BOUNDS.items() if ratios[name] > bound]
    for kind, error, bound in errors_by_kind():
        print(f"{kind:10s}{error:10.1e}  at most {bound:.0e}")
        if error > bound:
            missed.append(kind)
    print("missed: " + ", ".join(missed) if missed else "every figure is met")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
