"""Time of the layers of real models in every compute mode, against the same layer in 16 bit, with 32 bit beside it.

    python tests/bench/bench_linear.py [--quick] [--check] [--models flux ...] [--rows 4608 ...] [--seconds 480]

On a GPU the kernels' tests run first. A time counts only after that very case gave the right numbers. Rows are appended
to linear.csv with GPU, driver, torch, triton and commit; a decision table is printed: the fastest mode by rows.
`--check` exits with 1 where a target is missed. --quick takes a few layers; a CPU takes these by itself, and counts the
time of the process, so that neighbours count little. A * marks what `auto` takes.
"""

import argparse
import csv
import importlib.util
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
spec = importlib.util.spec_from_file_location("svdquant_conftest", ROOT / "tests" / "conftest.py")
spec.loader.exec_module(importlib.util.module_from_spec(spec))

import torch  # noqa: E402 (the lines above make the pack importable)

from svdquant_pack.kernels import LayerSpec, choose  # noqa: E402 (the lines above make the pack importable)
from svdquant_pack.kernels.timing import gpu_times  # noqa: E402
from svdquant_pack.tests.bench import linear_cases  # noqa: E402
from svdquant_pack.tests.bench.linear_cases import TOLERANCE, Case, Way, cases, checked_rows, error_of  # noqa: E402

CSV = Path(__file__).with_name("linear.csv")
HOPPER_GEOMEAN, HOPPER_WORST, HOPPER_AGAINST_KITCHEN, JIT_MEMORY = 1.5, 1.2, 2.0, 0.30  # H200, FLUX.1, M = 4608
CPU_AUTO = 0.65  # of the time of the faster of 16 and 32 bit, each layer of CPU_SHAPE with many rows
CPU_SHAPE = (3072, 3072)
GPU_TESTS = ("test_triton_*.py", "test_gpu_*.py")
TESTS_SHARE = 0.5  # of the time there is, for the kernels' tests


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in microseconds; error is that of the layer against its own 16-bit matrix."""

    commit: str
    device: str
    driver: str
    torch: str
    triton: str
    model: str
    layer: str
    format: str
    m: int
    n: int
    k: int
    backend: str
    mode: str
    stage: str
    passed: bool
    median_us: float
    spread_us: float
    times_16bit: float
    peak: float
    error: float
    memory: float


def processor() -> str:
    """Name of the CPU and how many of its threads torch uses."""
    found = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    name = found[0].partition(":")[2].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def environment(device: torch.device) -> dict[str, str]:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    driver, name = "", processor()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]
        except (OSError, IndexError):
            driver = str(torch.version.hip or "")
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    return {
        "commit": commit.stdout.strip(),
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": version,
    }


def measure(run: Callable[[], torch.Tensor], device: torch.device, repeats: int) -> tuple[float, float]:
    """(median, half of the middle half's width) in microseconds; on a GPU its own time alone, with a cold cache."""
    times = gpu_times(run, device, repeats) if device.type == "cuda" else _cpu_times(run, repeats)
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times) * 1e6, (quarters[2] - quarters[0]) / 2 * 1e6


def _cpu_times(run: Callable[[], torch.Tensor], repeats: int) -> list[float]:
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return times


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large product, measured now."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (measure(lambda: a @ b, device, 10)[0] * 1e-6)


def run_case(case: Case, device: torch.device, dtype: torch.dtype, known: dict, peak: float, quick: bool) -> list[Row]:
    """Every way to compute one case, the 16-bit one first."""
    data, rows, base = linear_cases.make_data(case, device, dtype), [], math.nan
    for way in linear_cases.ways(case, data):
        passed, error, median, spread = _try(way, data, device, 7 if quick else 20)
        base = median if way.mode == "16bit" else base
        work = 2 * case.m * case.n * case.k / (median * 1e-6) if way.stage != "expand" else math.nan
        expanded = case.n * case.k if way.mode == "w8a8" else 0  # kept beside the 4 bit
        dense = {"16bit": 1.0, "32bit": 2.0}.get(way.mode)
        memory = dense or (data.layer.nbytes() + expanded) / data.layer.spec.bytes_16bit()
        rows.append(
            Row(
                **known,
                model=case.model,
                layer=case.name,
                **{name: getattr(case, name) for name in ("format", "m", "n", "k")},
                backend=way.backend,
                mode=way.mode,
                stage=way.stage,
                passed=passed,
                median_us=round(median, 2),
                spread_us=round(spread, 2),
                times_16bit=round(base / median, 3),
                peak=round(work / peak, 3),
                error=round(error, 5),
                memory=round(memory, 4),
            )
        )
        print(" *" if is_auto(rows[-1], device, dtype) else "  ", _line(rows[-1]), flush=True)
    return rows


def is_auto(row: Row, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `auto` computes such a layer so."""
    if row.backend == "torch" or row.stage != "layer":
        return False
    choice = choose(LayerSpec(row.format, row.n, row.k), device, dtype, rows=row.m)
    return (row.backend, row.mode) == (choice.backend.name, choice.compute)


def _try(way: Way, data: linear_cases.Data, device: torch.device, repeats: int) -> tuple[bool, float, float, float]:
    """(right, error against 16 bit, median, spread); no time for what is wrong"""
    try:
        found = checked_rows(way.run())
        wrong = error_of(found, way.wanted())
        if not wrong <= TOLERANCE:
            print(f"   {way.backend} {way.mode} {way.stage}: WRONG by {wrong:.3g}", flush=True)
            return False, wrong, math.nan, math.nan
        error = error_of(found, data.exact) if way.stage == "layer" else math.nan
        return True, error, *measure(way.run, device, repeats)
    except Exception as failure:  # one way's fault must not end the others' measurement
        print(f"   {way.backend} {way.mode} {way.stage}: FAILED {type(failure).__name__}: {str(failure)[:200]}")
        return False, math.nan, math.nan, math.nan


def _line(row: Row) -> str:
    return (
        f"{row.backend:10s} {row.mode:10s} {row.stage:14s} {row.median_us:10.1f} us +- {row.spread_us:6.1f}"
        f"  {row.times_16bit:6.2f}x of 16 bit  {100 * row.peak:5.1f}% of peak  error {row.error:.4f}"
    )


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def decisions(rows: list[Row]) -> list[str]:
    """By format and number of rows: every mode's speed against 16 bit, geometric mean over layers, fastest first."""
    lines = ["", "fastest mode by rows (geometric mean of the speed against 16 bit; worst layer in brackets)"]
    layers = [row for row in rows if row.stage == "layer" and row.passed]
    for format, m in sorted({(row.format, row.m) for row in layers}):
        group = [row for row in layers if (row.format, row.m) == (format, m)]
        ways: dict[tuple[str, str], list[float]] = {}
        for row in group:
            ways.setdefault((row.mode, row.backend), []).append(row.times_16bit)
        ranked = sorted(ways.items(), key=lambda item: -geomean(item[1]))
        text = ", ".join(f"{mode} {name} {geomean(found):.2f} ({min(found):.2f})" for (mode, name), found in ranked)
        lines.append(f"  {format:10s} M={m:<6d} {text}")
    return lines


def missed(rows: list[Row], device: torch.device) -> list[str]:
    """The targets that are not reached, one sentence each."""
    wrong = [f"{row.layer} M={row.m} {row.backend} {row.mode} {row.stage} is wrong" for row in rows if not row.passed]
    layers = [row for row in rows if row.stage == "layer" and row.passed]
    if device.type == "cpu":
        for row in layers:
            if (row.n, row.k) != CPU_SHAPE or row.m == 1 or not is_auto(row, device, usual_dtype(device)):
                continue
            dense = [other for other in layers if other.backend == "torch" and _same_case(other, row)]
            share = row.median_us / min(other.median_us for other in dense)
            print(f"auto of {row.format} {row.n} x {row.k}, {row.m} rows: {share:.2f} of the faster dense layer")
            if share > CPU_AUTO:
                wrong.append(f"auto of {row.format} takes {share:.2f} at {row.m} rows, allowed {CPU_AUTO}")
        return wrong
    if torch.cuda.get_device_capability(device) != (9, 0):
        print("no targets are set for this GPU")
        return wrong
    flux = [row for row in layers if (row.model, row.m, row.format) == ("flux", 4608, "int4")]
    stock = {row.layer: row for row in flux if row.mode == "w4a4"}
    best: dict[str, Row] = {}
    for row in flux:
        allowed = stock[row.layer].error if row.layer in stock else math.inf
        ours = row.backend not in ("torch", "kitchen") and row.mode != "w8a8"  # which takes more than 4 bit of memory
        if ours and row.error <= allowed:
            best[row.layer] = max(row, best.get(row.layer, row), key=lambda found: found.times_16bit)
    speeds = [row.times_16bit for row in best.values()]
    if not speeds:
        return [*wrong, "no FLUX.1 layer was measured at M = 4608"]
    if geomean(speeds) < HOPPER_GEOMEAN:
        wrong.append(f"FLUX.1 at M = 4608 runs at {geomean(speeds):.2f}x of 16 bit, needed {HOPPER_GEOMEAN}")
    if min(speeds) < HOPPER_WORST:
        wrong.append(f"the slowest FLUX.1 layer runs at {min(speeds):.2f}x of 16 bit, needed {HOPPER_WORST}")
    kitchen = [
        row.median_us / best[row.layer].median_us for row in flux if row.backend == "kitchen" and row.layer in best
    ]
    if kitchen and geomean(kitchen) < HOPPER_AGAINST_KITCHEN:
        wrong.append(f"{geomean(kitchen):.2f}x of comfy-kitchen, needed {HOPPER_AGAINST_KITCHEN}")
    heaviest = max(row.memory for row in best.values())
    if heaviest > JIT_MEMORY:
        wrong.append(f"weights take {heaviest:.3f} of 16 bit, allowed {JIT_MEMORY}")
    return wrong


def _same_case(a: Row, b: Row) -> bool:
    return (a.model, a.layer, a.format, a.m) == (b.model, b.layer, b.format, b.m)


def run_tests(files: list[Path], seconds: float) -> list[str]:
    """The test files that fail on this GPU or take too long. Side by side: most of the time goes into compiling."""
    faults, stop = [], time.monotonic() + seconds
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    runs = {file: subprocess.Popen([*command, str(file)], cwd=ROOT, **pipe) for file in files}
    for file, run in runs.items():
        try:
            output, _ = run.communicate(timeout=max(1, stop - time.monotonic()))
        except subprocess.TimeoutExpired:
            run.kill()
            output, _ = run.communicate()
            faults.append(f"{file.name} did not end within {seconds:.0f} s")
        else:
            if run.returncode:
                faults.append(f"{file.name} fails, exit code {run.returncode}")
        print(f"{file.name}\n{output[-4000:]}", flush=True)
    return faults


def save(rows: list[Row], path: Path) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small layers; what a CPU takes by itself")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--models", nargs="*", default=[], choices=[*linear_cases.SHAPES], help="default: all")
    parser.add_argument("--rows", nargs="*", type=int, default=[])
    parser.add_argument("--formats", nargs="*", default=["int4", "nvfp4"], choices=["int4", "nvfp4"])
    parser.add_argument("--seconds", type=float, default=480, help="start no further case after so long")
    parser.add_argument("--no-tests", action="store_true", help="do not run the kernels' tests first (GPU)")
    parser.add_argument("--csv", type=Path, default=CSV)
    return parser.parse_args()


def usual_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit dtype of a device; Turing has no bfloat16."""
    turing = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if turing else torch.bfloat16


def main() -> int:
    options, start = arguments(), time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = options.quick or device.type == "cpu"
    skipped = device.type == "cpu" or options.no_tests
    files = sorted(file for pattern in GPU_TESTS for file in (ROOT / "tests" / "kernels").glob(pattern))
    faults = [] if skipped else run_tests(files, TESTS_SHARE * options.seconds)
    dtype = usual_dtype(device)
    known, peak = environment(device), peak_flops(device, dtype)
    print(known, f"peak {peak / 1e12:.2f} T/s measured in {dtype}", flush=True)
    rows: list[Row] = []
    wanted = options.rows or list(linear_cases.QUICK_ROWS if quick else linear_cases.ROWS)
    for case in cases(quick, options.models, wanted, options.formats):
        if time.monotonic() - start > options.seconds:
            print("out of time: the other cases are not measured")
            break
        print(f"{case.model} {case.name} {case.format} M={case.m} N={case.n} K={case.k}", flush=True)
        with torch.inference_mode():
            rows += run_case(case, device, dtype, known, peak, quick)
    save(rows, options.csv)
    print("\n".join(decisions(rows)))
    faults += missed(rows, device)
    print("\n".join(["", *(faults or ["every target that is set for this device is reached"])]))
    return 1 if options.check and faults else 0


if __name__ == "__main__":
    sys.exit(main())
