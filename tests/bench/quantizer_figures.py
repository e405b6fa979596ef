"""The sections of bench_quantize.py: the quantizer against the reference recipe in the same code base."""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from types import MappingProxyType

import torch

from svdquant_pack.kernels import LayerSpec
from svdquant_pack.quantize.cli.tune import SHAPES
from svdquant_pack.quantize.files.tensor_file import TensorInfo
from svdquant_pack.quantize.maker.memory import PeakMemory
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.maths import smooth
from svdquant_pack.quantize.maths.fit import refine, svdquant
from svdquant_pack.quantize.maths.inputs import LayerInput, mean_of, to_16bit
from svdquant_pack.quantize.maths.layer import Dense, FittedLayer, Making, output_errors
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.bench import group_figures
from svdquant_pack.tests.bench.synthetic_layers import KINDS, make

FORMATS = ("int4", "nvfp4")
BF16 = torch.bfloat16
METHODS = {
    "svdquant": ("svdquant", "stock"),
    "svdquant+gptq": ("svdquant+gptq", "stock"),
    "balanced": ("balanced", "stock"),
    "stock": ("best", "stock"),
    "ours": ("best", "best"),
}


@dataclass
class Checks:
    """Figures with their bounds; `missed` collects one line for each that is out of it."""

    missed: list[str] = field(default_factory=list)

    def figure(self, name: str, value: float, most: float = math.inf, least: float = -math.inf) -> None:
        right = least <= value <= most
        bound = f"at most {most:g}" if most < math.inf else f"at least {least:g}"
        line = f"{name}: {value:.3f}, needed {bound}"
        say(f"  {'ok    ' if right else 'MISSED'} {line}")
        if not right:
            self.missed.append(line)


def say(text: str) -> None:
    print(text, flush=True)


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(fmean(map(math.log, values)))


def recipe_of(method: str, format: str) -> Recipe:
    name, activation = METHODS[method]
    return Recipe.named(name, format=format, activation=activation)


def make_fit(
    dense: Dense, tokens: torch.Tensor, recipe: Recipe, reuse: torch.Tensor | None = None, exact_svd: bool = False
) -> FittedLayer:
    """One layer by one recipe; `reuse` is the smoothing of an earlier run of the reference."""
    spec, making = dense.spec, Making(recipe, BF16)
    if recipe.smoothing == "grid":
        return svdquant(dense, tokens, making, exact_svd, reuse)
    shifted = LayerInput.plain(tokens, spec, tokens.device).whole(max(1, len(tokens) // 4096))
    act_mean = mean_of(tokens, spec, BF16, tokens.device) if recipe.centring else None
    if act_mean is not None:
        shifted -= act_mean
    factor = smooth.search([dense.weight], smooth.Inputs.of(shifted), spec, recipe.seed, recipe.adam_steps)
    return refine(dense, to_16bit(factor, BF16), tokens, making, act_mean)


def trained(seed: int, checks: Checks) -> None:
    """The demo model: 22 units, 20 steps, 64 images, three calibration seeds of 24 images."""
    from svdquant_pack.tests.bench.tiny_flux import TinyFlux, sample_psnr

    flux = TinyFlux()
    calibration = [10_000 * seed + place for place in (1, 2, 3)]
    test_seed, picture_seed, velocity_seed = (10_000 * seed + place for place in (101, 102, 103))
    say(f"calibration seeds {calibration}, test {test_seed}, pictures {picture_seed}, velocity {velocity_seed}")
    test, exact = flux.inputs(12, test_seed), flux.sample(flux.model, 64, picture_seed)
    found: dict[tuple[str, int, str], list[tuple[float, float, float, float]]] = {}
    for format in FORMATS:
        for rank in (4, 8):
            for one in calibration:
                tokens, smoothing = flux.inputs(24, one), {}
                for method in METHODS:
                    begun, fits, errors = time.perf_counter(), {}, []
                    recipe = recipe_of(method, format)
                    for place, unit in enumerate(flux.units):
                        unit_spec = unit.spec(flux.model, format, rank, recipe.act_rule)
                        dense = Dense(unit.weight(flux.model), unit.bias(flux.model), unit_spec)
                        rows = tokens[unit.module][:, unit.columns]
                        fit = make_fit(dense, rows, recipe, smoothing.get(place))
                        if recipe.smoothing == "grid":
                            smoothing[place] = fit.smooth
                        fits[place] = (unit_spec, fit)
                        held = test[unit.module][:, unit.columns]
                        errors.append(output_errors(fit, dense, held).total)
                    seconds = time.perf_counter() - begun
                    model = flux.with_fits(fits)
                    row = (
                        geometric_mean(errors),
                        flux.velocity_error(model, 16, velocity_seed),
                        sample_psnr(flux.sample(model, 64, picture_seed), exact),
                        seconds,
                    )
                    found.setdefault((format, rank, method), []).append(row)
                    figures = f"layer {row[0]:.4f}  velocity {row[1]:.4f}  PSNR {row[2]:.2f} dB  {seconds:.1f} s"
                    say(f"  {format:6} rank {rank}  {method:14} calibration {one}  {figures}")
    _trained_figures(found, checks)


def _trained_figures(
    found: dict[tuple[str, int, str], list[tuple[float, float, float, float]]], checks: Checks
) -> None:
    for format in FORMATS:
        for rank in (4, 8):
            base = [fmean(column) for column in zip(*found[format, rank, "svdquant+gptq"], strict=True)]
            for method in METHODS:
                columns = list(zip(*found[format, rank, method], strict=True))
                mean, spread = map(fmean, columns), map(stdev, columns)
                cells = "  ".join(f"{m:8.4f} +- {s:.4f}" for m, s in zip(mean, spread, strict=True))
                say(f"{format:6} rank {rank}  {method:14} layer, velocity, PSNR, seconds: {cells}")
            ours = [fmean(column) for column in zip(*found[format, rank, "ours"], strict=True)]
            name = f"{format} rank {rank}, ours against svdquant+gptq"
            checks.figure(f"{name}: layer error", ours[0] / base[0], most=0.86)
            checks.figure(f"{name}: velocity error", ours[1] / base[1], most=0.88)
            checks.figure(f"{name}: sample PSNR, dB more", ours[2] - base[2], least=1.0)


def synthetic(seed: int, checks: Checks, n: int = 768) -> None:
    """Layers of four kinds, error ratio to svdquant on other tokens; 8192 tokens each."""
    say(f"layer seed {seed}, n = {n}, rank 32")
    bias = torch.zeros(n)
    for format in FORMATS:
        ratios: dict[str, list[float]] = {}
        for kind in KINDS:
            layer, smoothing, base, cells = make(kind, n, n, 8192, seed), None, None, []
            unsigned = (0, n) if layer.gelu and format == "int4" else (0, 0)
            for method in METHODS:
                recipe = recipe_of(method, format)
                dense = Dense(layer.weight, bias, LayerSpec(format, n, n, 32, unsigned, recipe.act_rule))
                begun = time.perf_counter()
                fit = make_fit(dense, layer.calibration, recipe, smoothing)
                seconds = time.perf_counter() - begun
                smoothing = fit.smooth if recipe.smoothing == "grid" else smoothing
                error = output_errors(fit, dense, layer.test).total
                base = base or error
                ratios.setdefault(method, []).append(error / base)
                cells.append(f"{method} {error / base:.3f} ({seconds:.1f} s)")
            say(f"  {format:6} {kind:10} svdquant error {base:.4f}: " + "  ".join(cells))
        means = {method: geometric_mean(values) for method, values in ratios.items()}
        say(f"{format:6} geometric mean: " + "  ".join(f"{method} {mean:.3f}" for method, mean in means.items()))
        stock, ours = {"int4": (0.85, 0.80), "nvfp4": (0.93, 0.88)}[format]
        checks.figure(f"{format} synthetic, stock activation rules", means["stock"], most=stock)
        checks.figure(f"{format} synthetic, our activation rules", means["ours"], most=ours)


def speed(seed: int, checks: Checks, n: int = 768) -> None:
    """Seconds of one layer against the reference with its full float64 SVDs, on the same core."""
    layer, bias = make("adaln", n, n, 8192, seed + 1), torch.zeros(n)
    seconds = {}
    for method, exact_svd in (("svdquant", True), ("balanced", False), ("ours", False)):
        recipe = recipe_of(method, "int4")
        dense = Dense(layer.weight, bias, LayerSpec("int4", n, n, 32, (0, 0), recipe.act_rule))
        begun = time.perf_counter()
        make_fit(dense, layer.calibration, recipe, exact_svd=exact_svd)
        seconds[method] = time.perf_counter() - begun
        say(f"  n = {n}  {method:9} {'full SVDs ' if exact_svd else ''}{seconds[method]:.1f} s")
    checks.figure(
        "times faster than svdquant with full SVDs, balanced", seconds["svdquant"] / seconds["balanced"], least=8
    )


def one_layer(n: int, k: int, tokens: int, rank: int, seed: int) -> tuple[float, int, float]:
    """(seconds, peak bytes above the start, error) of a really quantized layer by `balanced`, int4."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    gain = torch.exp(0.5 * torch.randn(k, generator=generator))
    rows = (torch.randn(tokens + 256, k, generator=generator) * gain).to(BF16)
    dense = Dense(weight, torch.zeros(n), LayerSpec("int4", n, k, rank))
    with PeakMemory() as peak:
        begun = time.perf_counter()
        fit = make_fit(dense, rows[:tokens], Recipe.named("balanced"))
        seconds = time.perf_counter() - begun
    return seconds, peak.bytes, output_errors(fit, dense, rows[tokens:]).total


LARGE = ((12288, 3072), (3072, 12288))  # (out, in): fc1 and fc2 of FLUX.1
# (out, in, how often) of every low-rank linear of FLUX.1
FLUX = tuple((*shape, 38) for shape in SHAPES["flux"].values())  # 19 double blocks of two streams, 38 single ones


def large(seed: int, checks: Checks, tokens: int = 4096) -> None:
    """The two MLP layers of FLUX.1 at full size, and what follows for the whole model."""
    seconds = {}
    for n, k in LARGE:
        seconds[k], peak, error = one_layer(n, k, tokens, 32, seed)
        say(f"  {n} x {k}, {tokens} tokens: {seconds[k]:.0f} s, {peak / 1e9:.2f} GB above the start, error {error:.4f}")
    # same K: nearly everything is proportional to N; a wider K costs its square in the Hessian, so fc2 stands for both
    total = sum(count * seconds[min(k, 12288)] * (n * k) / (12288 * 3072) for n, k, count in FLUX)
    say(
        f"  estimate for FLUX.1, {tokens} tokens, on one core of this machine: {total / 3600:.1f} h for {6 * 38} layers"
    )


COST = (  # (out, in, tokens, rank): each of the four is varied on its own
    (256, 256, 4096, 32),
    (512, 512, 4096, 32),
    (1024, 1024, 4096, 32),
    (2048, 2048, 4096, 32),
    (1024, 1024, 16384, 32),
    (1024, 1024, 4096, 128),
    (512, 2048, 4096, 32),
    (2048, 512, 4096, 32),
)


def work_of(n: int, k: int, tokens: int, rank: int) -> list[float]:
    """The products that a layer's time is made of, in 1e9: noise model, Gram, GPTQ, Cholesky, branch, probe."""
    parts = (n * k, tokens * k * k, n * k * k, k**3, n * k * rank, tokens * n * k)
    return [part / 1e9 for part in parts]


def cost(seed: int, checks: Checks) -> None:
    """Seconds as a function of the layer's sizes, tokens and rank, and what follows for FLUX.1."""
    from scipy.optimize import nnls

    one_layer(*COST[0], seed)  # the first layer of a process pays for what is set up once
    found = []
    for n, k, tokens, rank in COST:
        seconds, peak, error = one_layer(n, k, tokens, rank, seed)
        found.append(seconds)
        sizes = f"{n:5} x {k:5}  tokens {tokens:6}  rank {rank:4}"
        say(f"  {sizes}: {seconds:6.2f} s  {peak / 1e6:6.0f} MB  error {error:.4f}")
    # relative residuals: a small layer counts as much as a large one
    rows = [[part / seconds for part in work_of(*row)] for row, seconds in zip(COST, found, strict=True)]
    weights, _ = nnls(rows, [1.0] * len(rows))

    def seconds_of(*row: int) -> float:
        return sum(weight * part for weight, part in zip(weights, work_of(*row), strict=True))

    worst = max(abs(seconds_of(*row) / seconds - 1) for row, seconds in zip(COST, found, strict=True))
    names = ("N K", "T K^2", "N K^2", "K^3", "N K R", "T N K")
    terms = " + ".join(f"{weight:.3g} {name}" for weight, name in zip(weights, names, strict=True) if weight)
    say(f"  seconds = {terms}, each product in 1e9; at most {worst:.0%} off in this table")
    for tokens in (4096, 32768):
        total = sum(count * seconds_of(n, k, tokens, 32) for n, k, count in FLUX)
        say(f"  estimate for FLUX.1, {tokens} tokens, rank 32, one core of this machine: {total / 3600:.1f} h")


def groups(seed: int, checks: Checks) -> None:
    """One branch for q, k and v against one for each: the demo model's trained ones, and three unrelated weights."""
    for name, rank, case in (
        ("demo", 16, group_figures.trained(seed)),
        ("synthetic", 32, group_figures.synthetic(seed)),
    ):
        for format in FORMATS:
            for method in ("fast", "balanced"):
                recipe = Recipe.named(method, format=format, rank=rank)
                own, same, equal = group_figures.ratios(*case, recipe)
                say(
                    f"  {name:9} {format:6} {method:8} rank {rank}: {own:.4f} with a branch for each; one for all at "
                    f"the same rank {same:.3f}, at equal bytes {equal:.3f} of it"
                )


class RandomFlux:
    """A 16-bit FLUX.1 of full size whose tensors are made when they are read; see `quantize.source.Source`."""

    name, family, unet_config, pinned = "random FLUX.1", "flux", MappingProxyType({}), ()

    def __init__(self, seed: int) -> None:
        layers = {
            f"double_blocks.{i}.{s}_{name}": _DOUBLE[name] for i in range(19) for s in _STREAMS for name in _DOUBLE
        }
        layers |= {f"single_blocks.{i}.{name}": shape for i in range(38) for name, shape in _SINGLE.items()}
        layers |= _OUTSIDE
        self.infos = {f"{layer}.weight": TensorInfo(shape, BF16) for layer, shape in layers.items()}
        self.infos |= {f"{layer}.bias": TensorInfo((shape[0],), BF16) for layer, shape in layers.items()}
        self._generator = torch.Generator().manual_seed(seed)

    def tensor(self, key: str) -> torch.Tensor:
        return torch.randn(self.infos[key].shape, generator=self._generator, dtype=BF16) * 0.02


def memory(seed: int, checks: Checks) -> None:
    """`fast` on all of FLUX.1 at full size: random bf16 weights, each made when its turn comes; 40 minutes."""
    source = RandomFlux(seed)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        # two rounds: a second one is where the first one's result is kept beside the work
        report = quantize_model(source, Path(folder) / "out.safetensors", Recipe(alternations=2))
        seconds, written = time.perf_counter() - begun, report.path.stat().st_size
    size, peak = sum(info.nbytes for info in source.infos.values()), report.peak_memory
    say(f"  {size / 1e9:.2f} GB to {written / 1e9:.2f} GB, {len(report.errors)} layers: {seconds:.0f} s")
    single = sum(2 * n * k for n, k in _SINGLE.values())
    say(f"  peak memory {peak / 1e9:.2f} GB, one single block has {single / 1e9:.2f} GB")
    checks.figure("fast, GB above one single block", (peak - single) / 1e9, most=3.0)


_STREAMS = ("img", "txt")
_DOUBLE = {
    "attn.qkv": (9216, 3072),
    "attn.proj": (3072, 3072),
    "mlp.0": (12288, 3072),
    "mlp.2": (3072, 12288),
    "mod.lin": (18432, 3072),
}
_SINGLE = {"linear1": (21504, 3072), "linear2": (3072, 15360), "modulation.lin": (9216, 3072)}
_OUTSIDE = {
    "img_in": (3072, 64),
    "txt_in": (3072, 4096),
    "time_in.in_layer": (3072, 256),
    "time_in.out_layer": (3072, 3072),
    "vector_in.in_layer": (3072, 768),
    "vector_in.out_layer": (3072, 3072),
    "guidance_in.in_layer": (3072, 256),
    "guidance_in.out_layer": (3072, 3072),
    "final_layer.adaLN_modulation.1": (6144, 3072),
    "final_layer.linear": (64, 3072),
}
SECTIONS: dict[str, Callable[[int, Checks], None]] = {
    "trained": trained,
    "synthetic": synthetic,
    "speed": speed,
    "cost": cost,
    "large": large,
    "memory": memory,
    "groups": groups,
}


def main(description: str) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a figure is missed")
    parser.add_argument("--seed", type=int, default=1, help="of calibration, test and layers")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    checks = Checks()
    say(f"torch {torch.__version__}, one thread, seed {options.seed}")
    for name in options.only:
        say(f"\n{name}: {SECTIONS[name].__doc__}")
        SECTIONS[name](options.seed, checks)
    say(
        "\n"
        + (json.dumps({"missed": checks.missed}, indent=2) if checks.missed else "every figure is within its bound")
    )
    return 1 if options.check and checks.missed else 0
