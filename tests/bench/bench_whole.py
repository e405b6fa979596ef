"""One call of whole models at real size in ComfyUI's own classes, 4-bit beside bf16, on a GPU.

    python tests/bench/bench_whole.py [--check] [--only flux sdxl] [--tiny]

FLUX.1, Qwen-Image, Z-Image, SDXL and Wan 2.1 14B with random weights, at 1024 x 1024 or 81 frames of 832 x 480. The
same layers are 4-bit as in a file: INT4 or, on GPUs that have it, NVFP4, rank 32, computed as `auto` chooses. The bf16
model is ComfyUI's own, with the weights that the 4-bit ones decode to, and runs first by itself. A time is that of a
call from outside, launches included: the median of several after two that are not counted. It is printed only after
the output of the 4-bit model was compared with the same model by plain torch. --check exits with 1 where a 4-bit model
takes longer or more memory than bf16. --tiny takes the tests' tiny models and any device: it tries this file out, its
times mean nothing.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import bench_lora
import bench_model
import bench_sdxl
import torch

RUNS = 7
RIGHT = (
    0.3  # by plain torch: another rounding in one layer is another code in the next, and random weights keep all of it
)
STEP = 0.7  # sigma


def real_models() -> dict[str, Any]:
    """name -> (its entry in the tests' zoo at real size, tokens of text)"""
    from svdquant_pack.tests.nodes.zoo_models import ZOO

    def of(name: str, config: Mapping[str, Any], latent: tuple[int, ...], text: int, **extra: tuple[int, ...]) -> Any:
        entry = ZOO[name]
        return replace(
            entry, config={**entry.config, **config}, latent=latent, text=text, extra={**entry.extra, **extra}
        )

    flux = {"hidden_size": 3072, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "context_in_dim": 4096}
    flux |= {"axes_dim": [16, 56, 56], "vec_in_dim": 768}
    qwen = {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584}
    qwen |= {"axes_dims_rope": [16, 56, 56]}
    z_image = {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30}
    z_image |= {"cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512]}
    wan = {"dim": 5120, "num_heads": 40, "ffn_dim": 13824, "num_layers": 40, "text_dim": 4096, "freq_dim": 256}
    image = (1, 16, 128, 128)
    return {
        "flux": (of("flux", flux, image, 4096, y=(1, 768)), 512),
        "qwen_image": (of("qwen_image", qwen, (1, 16, 1, 128, 128), 3584), 256),
        "z_image": (replace(of("z_image", z_image, image, 2560), extra={"num_tokens": ("value", 256)}), 256),
        "sdxl": (of("sdxl", bench_sdxl.CONFIG, (1, 4, 128, 128), 2048), 77),
        "wan": (of("wan_t2v", wan, (1, 16, 21, 60, 104), 4096), 512),
    }


def tiny_models() -> dict[str, Any]:
    from svdquant_pack.tests.nodes.zoo_models import TOKENS, ZOO

    names = {"flux": "flux", "qwen_image": "qwen_image", "z_image": "z_image", "sdxl": "sdxl", "wan": "wan_t2v"}
    return {name: (ZOO[zoo], TOKENS) for name, zoo in names.items()}


def empty(entry: Any, operations: type) -> torch.nn.Module:
    """ComfyUI's model, nothing in memory yet."""
    import comfy.model_detection

    settings = comfy.model_detection.model_config_from_unet_config(dict(entry.config))
    settings.set_inference_dtype(torch.bfloat16, None)
    settings.custom_operations = operations
    return settings.get_model({}, "", device=torch.device("meta"))


def random_numbers(shape: tuple[int, ...], name: str, device: torch.device) -> torch.Tensor:
    """What keeps activations about as large as they are: gains around 1, small biases"""
    values = torch.randn(shape, device=device)
    if len(shape) > 1:
        return values * (0.8 / math.prod(shape[1:]) ** 0.5)
    return 0.05 * values if name.endswith("bias") else 1 + 0.1 * values


def build(entry: Any, device: torch.device, format: str | None) -> torch.nn.Module:
    """The model on the device, with the layers that a file has in 4 bit; dense, with their decoded weights, for None

    format  of the layers with 4-bit activations
    """
    import comfy.ops

    from svdquant_pack.nodes.host.linear import SVDQuantLinear
    from svdquant_pack.quantize.families import FAMILIES
    from svdquant_pack.quantize.files.tensor_file import TensorInfo
    from svdquant_pack.quantize.linear import PackedLinear
    from svdquant_pack.quantize.maker.plan import plan_layers
    from svdquant_pack.quantize.recipe import Recipe

    model = empty(entry, comfy.ops.manual_cast)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.diffusion_model.state_dict().items()}
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
    if format:
        model = empty(entry, type("Operations", (comfy.ops.manual_cast,), {"Linear": SVDQuantLinear}))
    unet = model.diffusion_model
    plan = plan_layers(infos, FAMILIES[entry.family], Recipe(format=format or "int4", rank=bench_model.RANK))
    torch.manual_seed(0)
    for name, module in unet.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            spec, weight = plan.specs.get(name) if key == "weight" else None, None
            if spec is not None:
                generator = torch.Generator(device).manual_seed(0)
                layer = bench_model.layer_of(spec.n, spec.k, spec.format, generator)
                if format is None:
                    weight = layer.dense_weight()
                else:
                    blob, packed = PackedLinear.pack(layer)
                    module.take(packed, blob.to(device))
                    continue
            else:
                weight = random_numbers(shapes[f"{name}.{key}".lstrip(".")], key, device)
            module._parameters[key] = torch.nn.Parameter(weight.to(device, torch.bfloat16), requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                raise SystemExit(f"{name}.{key} has no numbers: this ComfyUI makes it where the model is built")
    return model.to(device).eval()


def inputs(entry: Any, tokens: int, device: torch.device) -> tuple[torch.Tensor, dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(1)

    def value(given: Any) -> Any:
        if isinstance(given, tuple) and given and given[0] == "value":
            return given[1]
        return torch.randn(given, device=device, generator=generator)

    more = {name: value(given) for name, given in entry.extra.items()}
    return value(entry.latent), {"c_crossattn": value((1, tokens, entry.text)), "transformer_options": {}, **more}


def measured(model: torch.nn.Module, entry: Any, tokens: int, device: torch.device) -> tuple[float, float]:
    """(seconds of a call, largest memory in GB)"""
    x, more = inputs(entry, tokens, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(RUNS + 2):
        wait()
        start = time.perf_counter()
        model.apply_model(x, torch.full((1,), STEP, device=device), **more)
        wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:]), torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def wrong_by(model: torch.nn.Module, entry: Any, tokens: int, device: torch.device) -> float:
    """Relative error of the model's output against plain torch on the same bytes; NaN is wrong by NaN"""
    from svdquant_pack.kernels.dispatch import by_reference

    x, more = inputs(entry, tokens, device)
    sigma = torch.full((1,), STEP, device=device)
    found = model.apply_model(x, sigma, **more).float() - x
    with by_reference():
        wanted = model.apply_model(x, sigma, **more).float() - x
    return ((found - wanted).norm() / wanted.norm()).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    bench_lora.start_host()
    if not options.tiny and not torch.cuda.is_available():
        print("whole models at real size need a GPU, and there is none; --tiny tries tiny ones on a CPU")
        return 0
    from svdquant_pack.kernels.dispatch import arch_of, faster_format

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    format = faster_format("int4", arch_of(device)[0]) or "int4"
    print(
        f"{format} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'a CPU'}, torch {torch.__version__}"
    )
    missed = []
    for name, (entry, tokens) in (tiny_models() if options.tiny else real_models()).items():
        if options.only and name not in options.only:
            continue
        with torch.inference_mode():
            rows = {}
            for way in (None, format):
                model = build(entry, device, way)
                if way and not (error := wrong_by(model, entry, tokens, device)) < RIGHT:
                    print(f"{name}: the 4-bit model is wrong by {error:.3g}, allowed are {RIGHT}: it is not timed")
                    missed.append(name)
                    break
                rows[way] = measured(model, entry, tokens, device)
                del model
                gc.collect()
                torch.cuda.empty_cache()
        if len(rows) < 2:
            continue
        (dense, dense_memory), (four, memory) = rows[None], rows[format]
        sides = f"bf16 {1e3 * dense:8.1f} ms {dense_memory:5.1f} GB   4-bit {1e3 * four:8.1f} ms {memory:5.1f} GB"
        print(f"{name:10}  {sides}   {four / dense:.2f} of the time   wrong by {error:.1e}")
        if four > dense or memory > dense_memory:
            missed.append(name)
    if missed:
        print(f"MISSED: {', '.join(missed)}")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
