"""Disks that are full, channels that are dead, layers that are too large: said, survived, and nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.kernels.layer import LayerError, LayerSpec
from svdquant_pack.quantize.calibration.file import Statistics, StatisticsError
from svdquant_pack.quantize.calibration.tokens import ModelCall
from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.files.tensor_file import TensorFileError
from svdquant_pack.quantize.maker.model import QuantizeError, quantize_model
from svdquant_pack.quantize.maths.layer import Dense
from svdquant_pack.quantize.recipe import NAMED, Recipe, bytes_of

NAN, INF = float("nan"), float("inf")
ROOT = Path(__file__).resolve().parents[2]
SIZE = 128


UNRESERVED = "import os, runpy, sys; del os.posix_fallocate; runpy.run_module('quantize', run_name='__main__')"


def quantize(folder: Path, largest_file: int | None = None, reserving: bool = True) -> subprocess.CompletedProcess:
    """`quantize --resume` in a process that cannot write past `largest_file` bytes of any file.

    reserving  False: on a system that cannot take room from a disk before it is written
    """
    resource = pytest.importorskip("resource", reason="limits of a process are a thing of Unix")
    limit = resource.RLIM_INFINITY if largest_file is None else largest_file
    command = ["quantize", str(folder / "model.safetensors"), str(folder / "out.safetensors")]
    return subprocess.run(
        [
            sys.executable,
            *(("-m", "quantize") if reserving else ("-c", UNRESERVED)),
            *command,
            "--rank",
            "16",
            "--resume",
            "--overwrite",
            "--json",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )


def model(layers: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"blocks.{i}.proj.weight": torch.randn(SIZE, SIZE, generator=generator).bfloat16() for i in range(layers)}
    return made | {"head.bias": torch.randn(5, generator=generator)}  # small: it stays in the stream's buffer


def test_a_full_disk_leaves_nothing_half_written_and_the_next_run_goes_on(tmp_path):
    save_file(model(), tmp_path / "model.safetensors")
    assert quantize(tmp_path).returncode == 0
    whole = (tmp_path / "out.safetensors").read_bytes()
    for limit in (1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "out.safetensors").write_bytes(b"an older file")
        done = quantize(tmp_path, limit, reserving=False)
        assert done.returncode == 1 and "File too large while out.safetensors was written to" in done.stderr
        assert "make room there and run again; the finished layers are kept for it" in done.stderr
        assert (tmp_path / "out.safetensors").read_bytes() == b"an older file"
        work = tmp_path / ".out.safetensors.work"
        assert {path.name for path in tmp_path.iterdir()} <= {"model.safetensors", "out.safetensors", work.name}
        assert not list(work.glob(".*")), "no half-written layer"
        kept = len(list(work.glob("*")))
    assert kept == 4, "all layers were made when the last byte did not fit"
    done = quantize(tmp_path)
    assert json.loads(done.stdout)["resumed"] == 4 and (tmp_path / "out.safetensors").read_bytes() == whole


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room on a disk")
def test_a_disk_that_is_too_small_is_an_error_before_the_first_layer_is_made(tmp_path):
    """Not after an hour. In the same way for a conversion, which named no folder."""
    save_file(model(), tmp_path / "model.safetensors")
    assert quantize(tmp_path).returncode == 0
    whole = tmp_path / "out.safetensors"
    done = quantize(tmp_path, whole.stat().st_size * 9 // 10)
    assert done.returncode == 1 and f"File too large while out.safetensors was written to {tmp_path}: " in done.stderr
    assert not (tmp_path / ".out.safetensors.work").exists(), "no layer was made"
    resource, layers = pytest.importorskip("resource"), []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.stat().st_size * 9 // 10, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large while k\.safetensors was written to {tmp_path}: make room"):
            convert_file(whole, tmp_path / "k.safetensors", "kitchen", progress=lambda *at: layers.append(at))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not layers and sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "out.safetensors"]


def test_statistics_that_the_disk_cannot_hold_are_refused_before_they_are_begun(tmp_path):
    with pytest.raises(StatisticsError, match=r"s\.safetensors may grow by 8,.* bytes and .* are free .*: keep fewer"):
        Statistics.create(tmp_path / "s.safetensors", {"a": 4096}, 10**9, {})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """(file, statistics): zeros in a weight's row and column, in a whole weight, and in an activation and all of one"""
    folder, generator = tmp_path_factory.mktemp("damaged"), torch.Generator().manual_seed(1)
    tensors = {f"blocks.{i}.proj.weight": torch.randn(SIZE, SIZE, generator=generator).bfloat16() for i in range(4)}
    tensors["blocks.0.proj.weight"][5] = 0
    tensors["blocks.0.proj.weight"][:, 9] = 0
    tensors["blocks.1.proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors")
    layers = [key.removesuffix(".weight") for key in tensors]
    made = Statistics.create(folder / "s.safetensors", dict.fromkeys(layers, SIZE), 512, {"shared": {}})
    for layer in layers:
        for step in range(8):
            x = torch.randn(1, 64, SIZE, generator=generator)
            x[..., 70] = 0  # a dead channel
            x[..., 64:128] *= layer != "blocks.2.proj"  # a dead group
            x *= layer != "blocks.3.proj"  # a layer that gets nothing
            made.entries[layer].observe(x, ModelCall(step, 8), generator)
    return folder / "model.safetensors", made


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("name", NAMED)
def test_zeros_do_no_harm(damaged, tmp_path, name, format):
    recipe = Recipe.named(name, format=format, rank=16, fallback=0.5)
    report = quantize_model(FileSource(damaged[0]), tmp_path / "x.safetensors", recipe, statistics=damaged[1])
    checkpoint, exact = open_checkpoint(tmp_path / "x.safetensors"), load_file(damaged[0])
    assert len(report.errors) == 4 and not report.kept
    for layer in checkpoint.specs:
        dense, wanted = checkpoint.layer(layer).dense_weight(), exact[f"{layer}.weight"].float()
        assert dense.isfinite().all() and (dense - wanted).norm() <= 0.2 * wanted.norm() + 1e-6
    dense = checkpoint.layer("blocks.0.proj").dense_weight()
    # a row of zeros is made of zero codes and of what the branch leaves there
    assert dense[5].abs().max() < 0.01 and not checkpoint.layer("blocks.1.proj").dense_weight().any()


def test_a_width_that_does_not_fit_the_group_is_reported(tmp_path):
    tensors = {"blocks.0.fits.weight": torch.randn(128, 128), "blocks.0.odd.weight": torch.randn(128, 144)}
    save_file(tensors, tmp_path / "in.safetensors")
    report = quantize_model(FileSource(tmp_path / "in.safetensors"), tmp_path / "out.safetensors", Recipe(rank=16))
    assert report.kept == {"blocks.0.odd": "144 input channels are no multiple of the int4 group of 64"}
    assert torch.equal(load_file(tmp_path / "out.safetensors")["blocks.0.odd.weight"], tensors["blocks.0.odd.weight"])
    nvfp4 = Recipe(rank=16, format="nvfp4")  # groups of 16
    assert not quantize_model(FileSource(tmp_path / "in.safetensors"), tmp_path / "out.safetensors", nvfp4).kept


TOO_LARGE = """
import importlib.util, json, resource, sys
spec = importlib.util.spec_from_file_location("conftest", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
from pathlib import Path
import torch
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.calibration.file import Statistics
folder, room = Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.RLIM_INFINITY))
recipe = Recipe.named("balanced", rank=16, adam_steps=2, start_rounds=1, rounds=1)
source, statistics = FileSource(folder / "model.safetensors"), Statistics.open(folder / "s.safetensors")
report = quantize_model(source, folder / "out.safetensors", recipe, statistics=statistics)
print(json.dumps(report.layers["blocks.0.mlp"]))
"""


def test_a_layer_too_large_for_memory_gets_a_block_diagonal_hessian(tmp_path):
    """4096 channels: a Hessian of 64 MB, its factor and what comes with them, where 700 MB are left."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to know how much memory a process has")
    pytest.importorskip("resource", reason="limits of a process are a thing of Unix")
    generator, k = torch.Generator().manual_seed(2), 4096
    save_file(
        {"blocks.0.mlp.weight": torch.randn(128, k, generator=generator).bfloat16()}, tmp_path / "model.safetensors"
    )
    made = Statistics.create(tmp_path / "s.safetensors", {"blocks.0.mlp": k}, 1200, {"shared": {}})
    made.entries["blocks.0.mlp"].observe(torch.randn(1, 1200, k, generator=generator), ModelCall(0, 1), generator)

    def run(room: int) -> subprocess.CompletedProcess:
        arguments = [str(ROOT / "tests" / "conftest.py"), str(tmp_path), str(room)]
        return subprocess.run([sys.executable, "-c", TOO_LARGE, *arguments], capture_output=True, text=True)

    done = run(700 << 20)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout)
    assert (
        any(note.startswith("block-diagonal Hessian of ") for note in record["notes"]) and record["output_error"] < 0.3
    )
    done = run(100 << 20)
    assert done.returncode == 1 and "can't allocate memory" in done.stderr and not list(tmp_path.glob(".out*"))


BAD_FIELDS = {
    "name": ("turbo", None, 3),
    "format": ("int3", "awq_w4a16", None),
    "rank": (-16, 8, 16.0, True, "32"),
    "auto_rank": (1, None, "yes"),
    "target_size": (-1, 1e9, NAN, True),
    "fallback": (-0.1, NAN, INF, "0.1", True),
    "act8_share": (-0.1, 1.1, NAN, None),
    "activation": ("finest", None),
    "smoothing": ("none", "noise_model", "grid"),  # the last two are not what the name `fast` stands for
    "smooth_power": (9, -0.5, NAN),
    "alternations": (0, -1, 2.5),
    "adam_steps": (-3, 0.5, True),
    "start_rounds": (-1, None),
    "rounds": (-1, 1.5, "3"),
    "damping": (-5, 0.0, 2, NAN),
    "refit_damping": (-1e-3, 1.5, NAN),
    "hessian_block": (1, 63, 0, 128.0),
    "input_noise": (1, None),
    "centring": ("False", 0),
    "bias_correction": (2, None),
    "modulation": ("int4", "8bit"),
    "seed": (-1, 1 << 63, 0.5, True),
    "branches": ("joint", None, True),
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD_FIELDS.items() for value in values]
)
def test_a_recipe_names_the_field_the_value_and_what_it_needs(field, value):
    with pytest.raises(ValueError) as caught:
        Recipe(**{field: value})
    assert str(caught.value).startswith(f"{field} is {value!r}, needed ")


def test_every_field_of_a_recipe_is_checked_and_every_named_one_is_legal():
    assert set(BAD_FIELDS) == set(Recipe.__dataclass_fields__)
    for name in NAMED:
        Recipe.named(name, rank=0, rounds=0, fallback=0, act8_share=1, damping=1e-6, hessian_block=64)


def test_a_number_is_one_setting_however_it_is_written():
    """A command line's 0 and a node's 0.0 are one recipe, so that they share the work of a stopped run."""
    whole, real = Recipe(fallback=0, act8_share=1), Recipe(fallback=0.0, act8_share=1.0)
    assert whole.hash() == real.hash() and whole.as_dict() == real.as_dict()


@pytest.mark.parametrize(("name", "smoothing"), [("balanced", "grid"), ("best", "weight_spans"), ("svdquant", "grid ")])
def test_a_name_with_the_smoothing_of_another_one_is_refused(name, smoothing):
    with pytest.raises(ValueError, match="smoothing is"):
        Recipe.named(name, smoothing=smoothing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.ones(8, 128)},
            r"weight has shape \(8, 128\), int4 at N=8, K=64, .* is made of \(8, 64\)",
        ),
        ({"weight": torch.ones(512)}, r"weight has shape \(512,\)"),
        ({"bias": torch.ones(64)}, r"bias has shape \(64,\), .* is made of \(8,\)"),
        ({"weight": torch.ones(8, 64, dtype=torch.int8)}, "weight has dtype int8, needed a float"),
        ({"weight": torch.full((8, 64), NAN)}, "weight holds NaN or Inf"),
        ({"bias": torch.full((8,), INF, dtype=torch.float8_e5m2)}, "bias holds NaN or Inf"),
    ],
)
def test_a_layer_that_does_not_fit_cannot_be_made(change, message):
    legal = {"weight": torch.ones(8, 64), "bias": None, "spec": LayerSpec("int4", 8, 64, 16)}
    Dense(**legal)
    with pytest.raises(LayerError, match=message):
        Dense(**{**legal, **change})


@pytest.mark.parametrize(("rank", "wide"), [(16, False), (128, True)])
def test_a_branch_wider_than_its_layers_is_said(tmp_path, rank, wide):
    save_file(model(1), tmp_path / "model.safetensors")
    target = tmp_path / "out.safetensors"
    report = quantize_model(FileSource(tmp_path / "model.safetensors"), target, Recipe(rank=rank, alternations=1))
    assert (report.bytes_4bit >= report.bytes_16bit) == wide
    said = [note for note in report.notes if f"a branch of rank {rank} is too wide" in note]
    assert len(said) == wide


@pytest.mark.parametrize(
    ("field", "value"),
    [("rounds", 10**4400), ("rank", 10**4400), ("name", []), ("format", {}), ("smoothing", [[]]), ("seed", [10**4400])],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_recipe_refuses_what_has_no_hash_or_no_digits_by_field(field, value):
    """The first was a number that cannot be written into the file, the others errors of Python without a field."""
    with pytest.raises(ValueError, match=f"^{'recipe' if field == 'name' else field} is "):
        Recipe.named(**{"name": "fast", field: value})


@pytest.mark.parametrize("size", [float("nan"), float("inf"), 1e300, -1.0])
def test_a_target_size_that_is_none_is_refused_by_name(size):
    with pytest.raises(ValueError, match=r"^target_size is .* GB, needed"):
        bytes_of(size)


@pytest.mark.parametrize("bias", [torch.zeros(127), torch.zeros(128, dtype=torch.int32)])
def test_a_bias_that_does_not_fit_names_file_and_layer(tmp_path, bias):
    path = tmp_path / "m.safetensors"
    save_file({"blocks.0.proj.weight": torch.randn(128, 128), "blocks.0.proj.bias": bias}, path)
    with pytest.raises(QuantizeError, match=r"^m.safetensors: layer blocks.0.proj: bias has"):
        quantize_model(FileSource(path), tmp_path / "out.safetensors", Recipe(rank=16))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["blocks.1.proj.weight_scale", "blocks.0.proj.other", "x.comfy_quant"])
def test_a_tensor_that_would_stand_for_a_part_of_a_4bit_layer_is_refused_by_name(tmp_path, name):
    """The file was written, and could not be opened."""
    save_file({"blocks.0.proj.weight": torch.randn(128, 128), name: torch.ones(())}, tmp_path / "m.safetensors")
    with pytest.raises((QuantizeError, TensorFileError), match=rf"^m.safetensors: .*({name}|is a 4-bit model already)"):
        quantize_model(FileSource(tmp_path / "m.safetensors"), tmp_path / "out.safetensors", Recipe(rank=16))
