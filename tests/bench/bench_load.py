"""How fast and in how much memory a Nunchaku file is read.

    python tests/bench/bench_load.py [--quick] [--check] [--folder FOLDER]

1. One INT4 layer of 3072 x 12288, from file to natural order, against a plain torch copy of the same bytes.
2. The same layer and its native form, with checksums against without: what comparing them costs.
3. A synthetic FLUX.1 file (19 double and 38 single blocks of random codes, 6.5 GB) opened and read layer by layer while
   every layer is kept, in a process of its own: seconds, and peak memory over the process's start.

--quick uses two blocks of each kind, --check exits with 1 when a target is missed.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import conftest  # noqa: E402, F401 - loads the pack as svdquant_pack

from svdquant_pack.quantize.files.convert import convert_file  # noqa: E402
from svdquant_pack.quantize.files.integrity import KEY  # noqa: E402
from svdquant_pack.quantize.files.open import open_checkpoint  # noqa: E402
from svdquant_pack.quantize.files.tensor_file import TensorFile, TensorWriter  # noqa: E402

MOST_COPIES = 8.0  # reading a layer may cost this many plain copies of its bytes
LEAST_CHECKSUMS = 1e9  # bytes per second that comparing checksums must not be slower than
MOST_MEMORY = 1 << 30  # bytes over the size of the file
H, MLP, RANK, TEXT = 3072, 12288, 32, 4096
Tensors = dict[str, torch.Tensor]


def random_codes(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    words = torch.Size(shape).numel() * dtype.itemsize // 8
    return torch.randint(-(2**63), 2**63 - 1, (words,), dtype=torch.int64).view(dtype).view(shape)


def bfloat16(*shape: int) -> torch.Tensor:
    return (torch.rand(shape) / 16 + 0.01).bfloat16()


def w4a4(n: int, k: int) -> Tensors:
    layer = {"qweight": random_codes(n, k // 2), "wscales": bfloat16(k // 64, n), "bias": torch.zeros(n).bfloat16()}
    layer |= {"smooth": torch.ones(k).bfloat16(), "smooth_orig": torch.ones(k).bfloat16()}
    return layer | {"lora_down": bfloat16(k, RANK), "lora_up": bfloat16(n, RANK)}


def awq(n: int, k: int) -> Tensors:
    scales = bfloat16(k // 64, n)
    qweight = random_codes(n // 4, k // 2, dtype=torch.int32)
    return {"qweight": qweight, "wscales": scales, "wzeros": -7 * scales, "bias": torch.zeros(n).bfloat16()}


def double_block() -> dict[str, Callable[[], Tensors]]:
    layers: dict[str, Callable[[], Tensors]] = {}
    for norm, suffix in (("norm1", ""), ("norm1_context", "_context")):
        layers |= {
            f"{norm}.linear": lambda: awq(6 * H, H),
            f"qkv_proj{suffix}": lambda: w4a4(3 * H, H),
            f"out_proj{suffix}": lambda: w4a4(H, H),
            f"mlp{suffix}_fc1": lambda: w4a4(MLP, H),
            f"mlp{suffix}_fc2": lambda: w4a4(H, MLP),
        }
    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    return layers | {norm: lambda: {"weight": torch.ones(128).bfloat16()} for norm in norms}


def single_block() -> dict[str, Callable[[], Tensors]]:
    return {
        "norm.linear": lambda: awq(3 * H, H),
        "qkv_proj": lambda: w4a4(3 * H, H),
        "mlp_fc1": lambda: w4a4(MLP, H),
        "out_proj": lambda: w4a4(H, H),
        "mlp_fc2": lambda: w4a4(H, MLP),
        **{norm: lambda: {"weight": torch.ones(128).bfloat16()} for norm in ("norm_q", "norm_k")},
    }


def outside() -> dict[str, Callable[[], Tensors]]:
    shapes = {"x_embedder": (H, 64), "context_embedder": (H, TEXT), "norm_out.linear": (2 * H, H), "proj_out": (64, H)}
    for name, k in (("timestep_embedder", 256), ("guidance_embedder", 256), ("text_embedder", 768)):
        shapes |= {f"time_text_embed.{name}.linear_1": (H, k), f"time_text_embed.{name}.linear_2": (H, H)}
    return {
        name: lambda n=n, k=k: {"weight": bfloat16(n, k), "bias": torch.zeros(n).bfloat16()}
        for name, (n, k) in shapes.items()
    }


def write_flux(path: Path, doubles: int, singles: int) -> None:
    """A FLUX.1 file as Nunchaku writes it, one layer in memory at a time."""
    modules = outside()
    for i in range(doubles):
        modules |= {f"transformer_blocks.{i}.{name}": make for name, make in double_block().items()}
    for i in range(singles):
        modules |= {f"single_transformer_blocks.{i}.{name}": make for name, make in single_block().items()}
    with TensorWriter(path, {}, extra=10 * len(modules)) as writer:
        for name, make in modules.items():
            for suffix, tensor in make().items():
                writer.add(f"{name}.{suffix}", tensor)


def best(function: Callable[[], object], repeats: int = 15) -> float:
    """Seconds of processor time, which other processes on the machine do not lengthen."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def bench_layer(folder: Path) -> bool:
    path = folder / "one_layer.safetensors"
    with TensorWriter(path, {}) as writer:
        for suffix, tensor in w4a4(H, MLP).items():
            writer.add(f"x.{suffix}", tensor)
    file = TensorFile(path)
    stored = [file.read(name) for name in file if not name.endswith("smooth_orig")]
    checkpoint = open_checkpoint(path, as_is=True)
    copying = best(lambda: [tensor.clone() for tensor in stored])
    reading = best(lambda: checkpoint.layer("x"))
    size = sum(tensor.nbytes for tensor in stored)
    good = reading <= MOST_COPIES * copying
    sys.stdout.write(
        f"layer {H} x {MLP}, {size / 1e6:.1f} MB: copy {copying * 1e3:.1f} ms, read {reading * 1e3:.1f} ms, "
        f"ratio {reading / copying:.1f} (target {MOST_COPIES:.0f}) {'ok' if good else 'MISSED'}\n"
    )
    good &= bench_checksums(path, folder / "native.safetensors")
    path.unlink()
    return good


def bench_checksums(stored: Path, native: Path) -> bool:
    """Both files read with the checksums that their writer gave them, and again without."""
    convert_file(stored, native, "native", as_is=True)
    good = True
    for path in (stored, native):  # in the system's cache by now: a disk would make the share smaller
        bare = path.with_name(f"bare_{path.name}")
        bare.write_bytes(path.read_bytes().replace(KEY.encode(), KEY.upper().encode(), 1))
        with_them, without = open_checkpoint(path, as_is=True), open_checkpoint(bare, as_is=True)
        size = with_them.layer("x").nbytes()
        verified, unverified = best(lambda c=with_them: c.layer("x")), best(lambda c=without: c.layer("x"))
        rate = size / max(1e-9, verified - unverified)
        ok = rate >= LEAST_CHECKSUMS
        sys.stdout.write(
            f"checksums, {with_them.dialect}: {verified * 1e3:.1f} ms with, {unverified * 1e3:.1f} ms without, ratio "
            f"{verified / unverified:.2f}, {rate / 1e9:.1f} GB/s (target {LEAST_CHECKSUMS / 1e9:.0f}) "
            f"{'ok' if ok else 'MISSED'}\n"
        )
        good &= ok
        bare.unlink()
    return good


def read_flux(path: Path) -> bool:
    """In a fresh process: open, read every layer and tensor, keep all of it."""
    before = peak_memory()
    start = time.perf_counter()
    checkpoint = open_checkpoint(path)
    opened = time.perf_counter() - start
    kept = [checkpoint.layer(name) for name in checkpoint.specs]
    rest = [checkpoint.tensor(name) for name in checkpoint.rest]
    seconds = time.perf_counter() - start
    size, peak = path.stat().st_size, peak_memory()
    held = sum(layer.nbytes() for layer in kept) + sum(tensor.nbytes for tensor in rest)
    good = peak <= size + MOST_MEMORY
    sys.stdout.write(
        f"flux file of {size / 1e9:.2f} GB, {len(kept)} layers: open {opened:.2f} s, all {seconds:.1f} s "
        f"({size / seconds / 1e9:.2f} GB/s)\n"
        f"held {held / 1e9:.2f} GB, peak memory {peak / 1e9:.2f} GB (at start {before / 1e9:.2f} GB), "
        f"target {(size + MOST_MEMORY) / 1e9:.2f} GB {'ok' if good else 'MISSED'}\n"
    )
    return good


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_flux(folder: Path, doubles: int, singles: int) -> bool:
    needed = (doubles * 162 + singles * 85 + 300) * 10**6
    free = shutil.disk_usage(folder).free
    if free < needed:
        sys.stdout.write(f"not run: {folder} has {free / 1e9:.1f} GB free, needed {needed / 1e9:.1f} GB (--folder)\n")
        return False
    path = folder / "flux.safetensors"
    start = time.perf_counter()
    write_flux(path, doubles, singles)
    sys.stdout.write(f"wrote {doubles} + {singles} blocks in {time.perf_counter() - start:.0f} s\n")
    sys.stdout.flush()
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), "--read", str(path)], check=False)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two blocks of each kind")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--folder", help="where the files are written for the time of the run")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.read:
        return 0 if read_flux(arguments.read) else 1
    blocks = (2, 2) if arguments.quick else (19, 38)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        good = [bench_layer(Path(folder)), bench_flux(Path(folder), *blocks)]
    return 0 if all(good) or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
