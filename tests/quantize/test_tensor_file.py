"""Safetensors files: lazy reading, streamed writing, nothing half-written."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.files import tensor_file
from svdquant_pack.quantize.files.dialects import native
from svdquant_pack.quantize.files.tensor_file import DTYPES, TensorFile, TensorFileError, TensorInfo, TensorWriter
from svdquant_pack.tests.kernels.layers import random_layer

FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}


def write(path, tensors, order=None, **metadata):
    with TensorWriter(path, {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])
        writer.metadata |= metadata


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from(sorted(DTYPES.values(), key=str)),
    backwards=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_by_us_and_by_the_library(tmp_path_factory, shapes, dtype, backwards):
    path = tmp_path_factory.mktemp("round") / "x.safetensors"
    tensors = {f"t.{i}": torch.randint(0, 2, shape).to(dtype) for i, shape in enumerate(shapes)}
    write(path, tensors, order=list(tensors)[:: -1 if backwards else 1], family="flux")
    ours, theirs = TensorFile(path), load_file(path)
    assert ours.metadata == {"family": "flux"} and set(ours) == set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        assert ours.infos[name] == TensorInfo.of(tensor)
        assert torch.equal(ours.read(name).float(), tensor.float()) and torch.equal(
            theirs[name].float(), tensor.float()
        )


def test_a_failed_run_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), TensorWriter(path, {"a": TensorInfo((2,), torch.float32)}) as writer:
        writer.write("a", torch.zeros(2))
        raise KeyboardInterrupt
    plan = dict.fromkeys("ab", TensorInfo((2,), torch.float32))
    with pytest.raises(TensorFileError, match="never came, first b"), TensorWriter(path, plan) as writer:
        writer.write("a", torch.zeros(2))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path):
    plan = {"a": TensorInfo((2,), torch.float32)}
    with pytest.raises(TensorFileError, match="planned was"), TensorWriter(tmp_path / "x.safetensors", plan) as writer:
        writer.write("a", torch.zeros(3))
    assert not list(tmp_path.iterdir())


def test_metadata_has_one_order(tmp_path):
    """What is kept of it is written again: in the library's own order no two conversions would be the same file."""
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {f"key{i}": "" for i in range(9, 0, -1)})
    assert list(TensorFile(tmp_path / "a.safetensors").metadata) == [f"key{i}" for i in range(1, 10)]


def test_metadata_of_any_size_fits(tmp_path):
    tensors = {"a": torch.arange(1000), "b": torch.zeros(0)}
    write(tmp_path / "x.safetensors", tensors, report="r" * 100_000)
    stored = TensorFile(tmp_path / "x.safetensors")
    assert stored.metadata["report"] == "r" * 100_000 and torch.equal(stored.read("a"), tensors["a"])
    write(tmp_path / "y.safetensors", {"b": torch.zeros(0)}, report="r" * 100_000)
    assert len(TensorFile(tmp_path / "y.safetensors").metadata["report"]) == 100_000


def damaged(data: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "eight bytes": data[:8],
        "cut header": data[:40],
        "cut data": data[:-1],
        "longer than it says": data + b"\0",
        "header length of 2^63": b"\xff" * 8 + data[8:],
        "not JSON": data[:9] + b"!" + data[10:],
        "text": b"<html>404</html>" * 9,
    }


@pytest.mark.parametrize("kind", damaged(b""))
def test_a_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(16), "b": torch.ones(2, 3)}, path)
    path.write_bytes(damaged(path.read_bytes())[kind])
    with pytest.raises(TensorFileError, match=r"model\.safetensors: not a whole safetensors file"):
        TensorFile(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TensorFileError, match="no such file"):
        TensorFile(tmp_path / "gone.safetensors")


CUT_SHORT = """
import importlib.util, os, sys
sys.path.insert(0, {tests!r})
import conftest
from svdquant_pack.quantize.files.checkpoint import CheckpointError
from svdquant_pack.quantize.files.open import open_checkpoint
checkpoint = open_checkpoint({path!r})
os.truncate({path!r}, os.path.getsize({path!r}) // 2)
said = []
for read, names in ((checkpoint.layer, checkpoint.specs), (checkpoint.tensor, checkpoint.rest)):
    for name in names:
        try:
            read(name)
        except CheckpointError as error:
            said.append(str(error))
assert said and all("x.safetensors" in text and "ends early" in text for text in said), said
print("refused", len(said))
"""


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="Windows does not let an open file be cut short")
def test_a_file_cut_short_after_opening_is_an_error_and_no_signal(tmp_path):
    """In a process of its own: reading a mapped file there ends it by SIGBUS."""
    layers = {f"blocks.{i}.proj": random_layer("int4", 128, 512, 16, dtype=torch.bfloat16) for i in range(8)}
    tensors = {key: part for name, layer in layers.items() for key, part in native.encode_layer(name, layer).items()}
    path = tmp_path / "x.safetensors"
    save_file(tensors | {"head.weight": torch.ones(256, 256)}, path)
    script = CUT_SHORT.format(tests=str(Path(__file__).resolve().parents[1]), path=str(path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.startswith("refused"), (done.returncode, done.stderr[-500:])


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="Windows does not let an open file be replaced")
def test_a_replaced_file_is_still_the_one_that_was_opened(tmp_path):
    save_file({"a": torch.zeros(8)}, tmp_path / "x.safetensors")
    save_file({"long name": torch.ones(99), "a": torch.ones(8)}, tmp_path / "new.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    (tmp_path / "new.safetensors").replace(file.path)
    assert not file.read("a").any()


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no open file is replaced here")
@pytest.mark.parametrize("checksums", [True, False])
def test_a_file_that_is_replaced_while_it_is_opened_is_one_of_the_two(tmp_path, monkeypatch, checksums):
    """Its header was the new file's and its data the old one's: refused as damaged, or, without checksums, read."""
    path, new = tmp_path / "x.safetensors", tmp_path / "new"
    save = write if checksums else lambda path, tensors: save_file(tensors, path)
    save(path, {"a": torch.zeros(7), "b": torch.ones(3)})
    save(new, {"a": torch.zeros(3), "b": torch.full((7,), 2.0)})

    def replaced_meanwhile(*arguments, **keywords):
        new.replace(path)
        return safe_open(*arguments, **keywords)

    monkeypatch.setattr(tensor_file, "safe_open", replaced_meanwhile)
    file = TensorFile(path)
    assert torch.equal(file.read("a"), torch.zeros(7)) and torch.equal(file.read("b"), torch.ones(3))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room on a disk")
def test_the_room_is_taken_before_the_first_tensor_comes(tmp_path):
    data = torch.arange(1 << 20).to(torch.uint8)
    with TensorWriter(tmp_path / "x.safetensors", {"a": TensorInfo.of(data)}) as writer:
        (temporary,) = tmp_path.iterdir()
        assert temporary.stat().st_blocks * 512 >= data.nbytes
        writer.write("a", data)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], data)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_a_dead_process_left_goes_when_the_file_is_written_again(tmp_path):
    stale = tmp_path / ".x.safetensors.999999999.tmp"
    stale.write_bytes(bytes(100))
    write(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has other permissions")
def test_a_file_that_may_not_be_read_is_said_to_be_one():
    """It was called truncated, or not there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file({"a": torch.zeros(1)}, path)
        path.chmod(0)
        Path(folder).chmod(0o755)
        root = os.geteuid() == 0
        if root:  # to whom everything is readable
            os.seteuid(65534)
        try:
            with pytest.raises(TensorFileError, match=r"x\.safetensors: cannot be opened \(Permission denied\)"):
                TensorFile(path)
        finally:
            if root:
                os.seteuid(0)
