"""Quantizing streams: memory near one layer, and a stopped run leaves nothing."""

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.maker.model import QuantizeError, quantize_model
from svdquant_pack.quantize.recipe import Recipe

LAYERS, SIZE = 16, 1024


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model of 16 linears of 1024 x 1024: 32 MiB in 16 bit."""
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"blocks.{i}.proj.weight": torch.randn(SIZE, SIZE, generator=generator).half() for i in range(LAYERS)}, path
    )
    return path


def live_bytes() -> int:
    """Bytes that Python's objects hold: storages of all tensors, and what the interpreter and numpy allocated.

    Counted, not measured: neither the allocator's habits nor the load of the machine change it.
    """
    gc.collect()
    tensors = (one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter))
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values()) + tracemalloc.get_traced_memory()[0]


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_layers(source, tmp_path, traced):
    used, path, recipe = [], tmp_path / "out.safetensors", Recipe(rank=16, alternations=1)
    quantize_model(FileSource(source), path, recipe, lambda *_: used.append(live_bytes()))
    assert len(used) == LAYERS + 1
    made = path.stat().st_size / LAYERS  # bytes of a layer in the file; twice or four times that is read for it
    # behind the first layer stay the records of all, an eighth of one layer in sum; what keeps every layer's tensors
    # would hold 15 layers more
    assert max(used[1:]) - used[1] < made, [round(value / made, 2) for value in used]


@pytest.mark.parametrize("stop_at", [0, 1, LAYERS - 1])
def test_a_stopped_run_leaves_the_folder_as_it_was(source, tmp_path, stop_at):
    old = tmp_path / "out.safetensors"
    old.write_bytes(b"an older file")

    def progress(done: int, total: int, layer: str) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(FileSource(source), old, Recipe(rank=16, alternations=1), progress)
    assert old.read_bytes() == b"an older file" and [path.name for path in tmp_path.iterdir()] == [old.name]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_weight_is_named_and_nothing_is_written(tmp_path, poison):
    weight = torch.randn(128, 128)
    weight[3, 5] = poison
    save_file(
        {"blocks.0.proj.weight": torch.randn(128, 128), "blocks.1.proj.weight": weight}, tmp_path / "in.safetensors"
    )
    with pytest.raises(QuantizeError, match=r"in\.safetensors: blocks\.1\.proj\.weight holds NaN or Inf"):
        quantize_model(FileSource(tmp_path / "in.safetensors"), tmp_path / "out.safetensors", Recipe(rank=16))
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_k_that_does_not_fit_the_group_stays_in_16_bit(tmp_path):
    save_file(
        {"blocks.0.fits.weight": torch.randn(128, 128), "blocks.0.odd.weight": torch.randn(128, 144)},
        tmp_path / "in.safetensors",
    )
    report = quantize_model(FileSource(tmp_path / "in.safetensors"), tmp_path / "out.safetensors", Recipe(rank=16))
    assert set(report.errors) == {"blocks.0.fits"}
