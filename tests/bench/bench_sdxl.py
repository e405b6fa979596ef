"""SDXL's UNet at real size (2.57 G random weights) on a CPU: the 4-bit file beside the 16-bit one, in ComfyUI's class.

    python tests/bench/bench_sdxl.py FOLDER [--check] [--threads 2] [--latent 64]

Takes 8 GB of FOLDER and, the first time, ten minutes on two cores to quantize (INT4, rank 32, recipe fast, by the
command line). Both files stay there for the next time. Each is then loaded as the host's own loader and the pack's do
it by default, in a process of its own: the first call of the model, the least of three more, and the largest memory.
The times are of the process, so that neighbours count little. --check exits with 1 where a bound is missed.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import bench_lora

BOUNDS = {"steady": 0.65, "first": 1.2}  # of the 16-bit model's
MEMORY = 7.0  # GB
RIGHT = 0.3  # relative error against the 16-bit model: random weights, rounded without statistics, give about 0.16
FOUR_BIT = "_int4"
CONFIG = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "channel_mult": [1, 2, 4],
    "context_dim": 2048,
    "num_head_channels": 64,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}


def make_source(path: Path) -> None:
    """The 16-bit file: every weight random, of the size that keeps activations as they are."""
    import torch
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init
    from safetensors.torch import save_file

    plain = {key: value for key, value in CONFIG.items() if not key.startswith("use_temporal")}
    model = UNetModel(**plain, device="meta", dtype=torch.float16, operations=disable_weight_init)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, parameter in model.state_dict().items():
        if parameter.ndim > 1:
            values = torch.randn(parameter.shape, generator=generator) * (0.8 / parameter[0].numel() ** 0.5)
        else:
            values = torch.full(parameter.shape, float(name.endswith("weight")))  # of a norm
        tensors[name] = values.half()
    save_file(tensors, path)


def run_one(path: Path, threads: int, latent: int, output: Path) -> None:
    """Load a file, call its model, print the figures as JSON."""
    import comfy.model_management
    import comfy.sd
    import torch

    from svdquant_pack.nodes.host.model import load_model

    torch.set_num_threads(threads)
    patcher = load_model(str(path)) if path.stem.endswith(FOUR_BIT) else comfy.sd.load_diffusion_model(str(path))
    comfy.model_management.load_models_gpu([patcher])
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(*shape, generator=generator) for shape in ((1, 4, latent, latent), (1, 77, 2048)))
    y, times = torch.randn(1, 2816, generator=generator), []
    with torch.inference_mode():
        for _ in range(4):
            start = time.process_time()
            found = patcher.model.apply_model(x, torch.ones(1), c_crossattn=context, y=y)
            times.append(time.process_time() - start)
    torch.save(found, output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"first": times[0], "steady": min(times[1:]), "memory": peak}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench_lora.start_host()
    if options.one is not None:
        run_one(options.one, options.threads, options.latent, options.folder)
        return 0
    import torch

    options.folder.mkdir(parents=True, exist_ok=True)
    source, made = options.folder / "sdxl.safetensors", options.folder / f"sdxl{FOUR_BIT}.safetensors"
    if not source.exists():
        make_source(source)
    if not made.exists():
        command = ["quantize", str(source), str(made), "--format", "int4", "--rank", "32", "--recipe", "fast"]
        subprocess.run([sys.executable, "-m", "quantize", *command], cwd=bench_lora.ROOT, check=True)
    figures, outputs = {}, {}
    for name, path in (("16 bit", source), ("4 bit", made)):
        output = options.folder / f"{path.stem}.pt"
        command = [sys.executable, __file__, str(output), "--one", str(path), "--threads", str(options.threads)]
        said = subprocess.run(
            [*command, "--latent", str(options.latent)], check=True, stdout=subprocess.PIPE, text=True
        )
        figures[name], outputs[name] = json.loads(said.stdout.splitlines()[-1]), torch.load(output, weights_only=True)
    error = ((outputs["4 bit"] - outputs["16 bit"]).norm() / outputs["16 bit"].norm()).item()
    print(f"relative error {error:.3f}, allowed {RIGHT}")
    if not error < RIGHT:
        return 1
    for name, found in figures.items():
        print(
            f"{name:7} first {found['first']:6.2f} s  then {found['steady']:6.2f} s  memory {found['memory']:5.2f} GB"
        )
    ratios = {key: figures["4 bit"][key] / figures["16 bit"][key] for key in BOUNDS}
    missed = [f"{key} {ratios[key]:.2f}, bound {bound}" for key, bound in BOUNDS.items() if ratios[key] > bound]
    if figures["4 bit"]["memory"] > MEMORY:
        missed.append(f"memory {figures['4 bit']['memory']:.2f} GB, bound {MEMORY}")
    print(", ".join(f"{key} {ratio:.2f} of 16 bit" for key, ratio in ratios.items()))
    print("\n".join(f"MISSED: {each}" for each in missed) or "every bound is kept")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
