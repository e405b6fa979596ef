"""One model in every form that its weights come in: the same tensors are the same source, and the same 4-bit bytes."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.files import raw_file, unpickle
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.files.sources import KINDS, gguf, open_source, torch_file
from svdquant_pack.quantize.files.tensor_file import TensorFileError
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.measure.files import compare_files
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.quantize.test_diffusers import diffusers, host

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RECIPE = Recipe(rank=16, alternations=1)
VAE = {"first_stage_model.decoder.conv_in.weight": torch.ones(2, 2), "cond_stage_model.x.weight": torch.ones(2, 2)}


def model(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A tiny FLUX, of which only one double and one single block is left."""
    return {key: tensor.to(dtype).contiguous() for key, tensor in host("flux").items() if "blocks.1." not in key}


def in_diffusers_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    everything = host("flux") | {key: tensor.float() for key, tensor in tensors.items()}
    dtype = next(iter(tensors.values())).dtype
    found = diffusers("flux", everything)
    return {key: tensor.to(dtype).contiguous() for key, tensor in found.items() if "blocks.1." not in key}


def quantized(path: Path, source: Path) -> bytes:
    quantize_model(FileSource(source), path, RECIPE)
    return path.read_bytes()


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int = 3) -> Path:
    """As Diffusers writes them; returns the index."""
    folder.mkdir(parents=True)
    names, where = sorted(tensors), {}
    for i in range(count):
        name = f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in names[i::count]}
        where |= dict.fromkeys(part, name)
        save_file(part, folder / name, {"format": "pt"})
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], kind: str = "F16") -> Path:
    """By the package's own writer, with the shapes that ggml has; what cannot be in blocks is F32."""
    package = pytest.importorskip("gguf")
    chosen = package.GGMLQuantizationType[kind]
    writer = package.GGUFWriter(str(path), "flux")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, tensor in tensors.items():
        if kind in ("F32", "F16", "BF16"):
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
            raw = tensor.to(dtype).contiguous().view(torch.uint8 if kind == "BF16" else dtype).numpy()
            writer.add_tensor(name, raw, raw_dtype=chosen)
        elif tensor.ndim == 2 and tensor.shape[-1] % 256 == 0:
            writer.add_tensor(name, package.quants.quantize(tensor.float().numpy(), chosen), raw_dtype=chosen)
        else:
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def every_form(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Path]:
    """The same tensors in each form that loses nothing."""
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    save_file({**prefixed, **VAE}, folder / "all_in_one.safetensors")
    index = write_shards(folder / "sharded", tensors)
    pipeline = folder / "pipeline"
    inner = write_shards(pipeline / "transformer", in_diffusers_names(tensors))
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    (pipeline / "transformer" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    save_file(in_diffusers_names(tensors), folder / "diffusers.safetensors")
    torch.save(tensors, folder / "plain.pt")
    torch.save({"state_dict": {**prefixed, **VAE}, "epoch": 3, "global_step": 4}, folder / "all_in_one.ckpt")
    tilted = {key: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for key, tensor in tensors.items()}
    torch.save(tilted, folder / "tilted.bin")
    return {
        "all in one": folder / "all_in_one.safetensors",
        "index": index,
        "a shard": index.with_name("diffusion_pytorch_model-00002-of-00003.safetensors"),
        "a folder of shards": index.parent,
        "a Diffusers pipeline": pipeline,
        "its transformer": pipeline / "transformer",
        "its index": inner,
        "Diffusers' names": folder / "diffusers.safetensors",
        "torch": folder / "plain.pt",
        "a checkpoint of torch": folder / "all_in_one.ckpt",
        "other strides": folder / "tilted.bin",
    }


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> tuple[dict[str, torch.Tensor], Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("forms")
    tensors = model()
    save_file(tensors, folder / "single.safetensors")
    return tensors, folder / "single.safetensors", every_form(folder, tensors)


def test_every_form_is_the_same_source_and_gives_the_same_bytes(forms, tmp_path):
    tensors, single, paths = forms
    expected = quantized(tmp_path / "expected.safetensors", single)
    for name, path in paths.items():
        source = FileSource(path)
        assert source.family == "flux" and list(source.infos) == sorted(tensors), name
        assert all(torch.equal(source.tensor(key), tensor) for key, tensor in tensors.items()), name
        assert (source.unet_config, source.pinned) == ({}, ()), name
        if name in ("index", "a Diffusers pipeline", "a checkpoint of torch"):
            assert quantized(tmp_path / "x.safetensors", path) == expected, name


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_gguf_without_loss_gives_the_same_bytes(tmp_path, kind):
    tensors = model({"F16": torch.float16, "BF16": torch.bfloat16}[kind])
    save_file(tensors, tmp_path / "single.safetensors")
    path = write_gguf(tmp_path / "x.gguf", tensors, kind)
    assert quantized(tmp_path / "a.safetensors", path) == quantized(
        tmp_path / "b.safetensors", tmp_path / "single.safetensors"
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q5_1"])
def test_quantized_gguf_is_what_its_own_package_decodes(tmp_path, kind):
    package = pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(0)
    wide = {f"blocks.{i}.proj.weight": torch.randn(128, 256, generator=generator) for i in range(2)}
    try:
        path = write_gguf(tmp_path / "x.gguf", {**wide, "head.bias": torch.ones(7)}, kind)
    except NotImplementedError:
        codes = torch.randint(0, 256, (128, 144), dtype=torch.uint8, generator=generator)  # Q4_K: 144 bytes to a row
        codes.view(torch.float16)[:, :2] = 0.01
        path = write_codes(tmp_path / "x.gguf", list(wide), codes, package.GGMLQuantizationType[kind])
    reader = package.GGUFReader(str(path))
    decoded = {
        tensor.name: torch.from_numpy(package.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    save_file(decoded, tmp_path / "decoded.safetensors")
    assert FileSource(path).infos == FileSource(tmp_path / "decoded.safetensors").infos
    assert quantized(tmp_path / "a.safetensors", path) == quantized(
        tmp_path / "b.safetensors", tmp_path / "decoded.safetensors"
    )


def write_codes(path: Path, names: list[str], codes: torch.Tensor, kind) -> Path:
    package = pytest.importorskip("gguf")
    writer = package.GGUFWriter(str(path), "flux")
    for name in names:
        writer.add_tensor(name, codes.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_shape_that_ggml_could_not_hold_is_the_one_stated(tmp_path):
    package = pytest.importorskip("gguf")
    weight = torch.randn(3, 2, 5, 7, 11)
    writer = package.GGUFWriter(str(tmp_path / "x.gguf"), "wan")
    writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", list(weight.shape))
    writer.add_tensor("patch_embedding.weight", weight.reshape(3, -1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.equal(open_source(tmp_path / "x.gguf").read("patch_embedding.weight"), weight)


def test_bitsandbytes_is_what_its_own_library_decodes(tmp_path):
    recorded = load_file(GOLDEN / "bitsandbytes.safetensors")
    packed = {key: tensor for key, tensor in recorded.items() if not key.startswith("decoded.")}
    decoded = {key.removeprefix("decoded."): tensor for key, tensor in recorded.items() if key.startswith("decoded.")}
    save_file(packed, tmp_path / "x.safetensors")
    source = FileSource(tmp_path / "x.safetensors")
    assert set(source.infos) == {f"{name}.weight" for name in decoded}
    for name, expected in decoded.items():
        found = source.tensor(f"{name}.weight")
        assert found.dtype == expected.dtype and torch.equal(found, expected), name


def test_bitsandbytes_quantizes_to_the_bytes_of_the_decoded_tensors(tmp_path):
    recorded = load_file(GOLDEN / "bitsandbytes.safetensors")
    name = "nf4_nested_bf16"
    packed, wide = {}, {}
    for i in range(2):
        layer = f"blocks.{i}.proj.weight"
        packed |= {
            key.replace(f"{name}.weight", layer): t.clone() for key, t in recorded.items() if key.startswith(f"{name}.")
        }
        wide[layer] = recorded[f"decoded.{name}"]
    save_file(packed, tmp_path / "nf4.safetensors")
    save_file({key: tensor.clone() for key, tensor in wide.items()}, tmp_path / "wide.safetensors")
    assert quantized(tmp_path / "a.safetensors", tmp_path / "nf4.safetensors") == quantized(
        tmp_path / "b.safetensors", tmp_path / "wide.safetensors"
    )
    assert compare_files(tmp_path / "nf4.safetensors", tmp_path / "wide.safetensors") == {}


# -- what cannot be opened says so in one line


def refused(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        FileSource(path)
    assert "\n" not in str(error.value)


def test_bad_folders_and_indexes_are_refused_by_name(tmp_path):
    tensors = {f"blocks.{i}.proj.weight": torch.ones(128, 128) for i in range(3)}
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "^empty: is a folder without a model")
    refused(tmp_path / "gone", "there is no such file")
    index = write_shards(tmp_path / "a", tensors)
    text = json.loads(index.read_text())
    for names, match in (
        ({"x": "../secret.safetensors"}, "is no name of a file beside it"),
        ({"x": "/etc/passwd"}, "is no name of a file beside it"),
        ({"x": "gone.safetensors"}, "gone.safetensors is not beside it"),
        (
            {**text["weight_map"], "blocks.9.proj.weight": next(iter(text["weight_map"].values()))},
            "blocks.9.proj.weight",
        ),
        ({"x": 3}, "is no index of shards"),
        ({}, "is no index of shards"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        refused(index, match)
    index.write_text("{" * 100_000)
    refused(index, "cannot be read as an index of shards")
    index.unlink()
    assert len(FileSource(index.parent).infos) == 3, "shards without an index"
    (index.parent / "diffusion_pytorch_model-00003-of-00003.safetensors").unlink()
    refused(index.parent, "00003-of-00003.safetensors is not beside it")
    both = tmp_path / "wan"
    for name in ("transformer", "transformer_2"):
        write_shards(both / name, tensors)
    refused(both, "holds two models, transformer and transformer_2")
    for name in ("a", "b"):
        (tmp_path / "two").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "two" / f"{name}.safetensors")
    refused(tmp_path / "two", "a folder of several models")


def test_the_variant_of_a_component_is_not_its_second_half(tmp_path):
    for name in ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16"):
        save_file({"blocks.0.proj.weight": torch.ones(128, 128)}, tmp_path / f"{name}.safetensors")
    assert FileSource(tmp_path).tensor("blocks.0.proj.weight").dtype == torch.float32


class Bomb:
    """What a hostile file runs when it is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_something_is_refused_and_nothing_is_run(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "x": Bomb(tmp_path / "ran")}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "its pickle holds more than tensors")
    assert not (tmp_path / "ran").exists()


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/version", b"3\n")
        for name, data in more.items():
            file.writestr(f"x/{name}", data)
    return path


def reduce(function: str, *arguments: object) -> bytes:
    """The pickle that calls a function by name."""
    module, name = function.split(" ")
    body = b"".join(pickle.dumps(argument, 2)[2:-1] for argument in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + body + b"tR."


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_pickle_that_wants_all_memory_stops_at_the_limit(tmp_path):
    path = archive(tmp_path / "x.ckpt", reduce("builtins bytearray", 1 << 40))
    refused(path, r"MemoryError|bytearray")


def test_archives_that_are_none_of_torch_are_refused(tmp_path):
    harmless = pickle.dumps({"a": 1}, 2)
    refused(archive(tmp_path / "a.pt", harmless, zipfile.ZIP_DEFLATED), "not one of torch.save")
    refused(archive(tmp_path / "b.pt", harmless, byteorder=b"big"), "another order of bytes")
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as file:
        file.writestr("readme.txt", "hello")
    refused(tmp_path / "d.pt", "not one of torch.save")
    torch.save({"a": torch.ones(300, 300)}, tmp_path / "e.pt")
    whole = (tmp_path / "e.pt").read_bytes()
    (tmp_path / "e.pt").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "e.pt", "not a whole file of torch.save")
    torch.save({"a": torch.ones(3)}, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "f.pt", "torch before 1.6")
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "g.pt")
    refused(tmp_path / "g.pt", "says 1,099,511,627,776 numbers and stores 1")


def test_tensors_by_name_are_found_where_they_are_saved():
    tensors = {"a": torch.ones(2)}
    for saved in (tensors, {"state_dict": tensors, "epoch": 1}, {"ema": tensors}):
        assert unpickle.state_dict_of(saved) is tensors
    with pytest.raises(ValueError, match="holds a Tensor, needed tensors by name"):
        unpickle.state_dict_of(torch.ones(3))


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        ["a", "float32", [2], [1], 0, None],
        ["a", "float32", [2], [1], 0, -1],
        ["a", "float32", [-2], [1], 0, 0],
        ["a", "float32", [2], [1, 1], 0, 0],
        ["a", "complex64", [2], [1], 0, 0],
        ["a", "float32", [1 << 40], [1 << 40], 0, 0],
        ["a", "float32", ["2"], [1], 0, 0],
        ["a", "float32", 2, 1, 0, 0],
        [3, "float32", [2], [1], 0, 0],
    ],
)
def test_what_the_child_says_is_not_trusted(tmp_path, monkeypatch, entry):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    monkeypatch.setattr(torch_file, "_entries", lambda path: [entry])
    with pytest.raises(TensorFileError, match=r"^x\.pt: "):
        torch_file.open_file(tmp_path / "x.pt")


def header(
    *tensors: tuple[str, tuple[int, ...], int, int], keys: bytes = b"", count: int = 0, version: int = 3
) -> bytes:
    """A GGUF header, whatever it says."""
    found = b"GGUF" + struct.pack("<IQQ", version, len(tensors), count) + keys
    for name, sizes, kind, offset in tensors:
        found += struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        found += struct.pack("<IQ", kind, offset)
    return found + bytes(-len(found) % 32)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"GGUF", "truncated or damaged"),
        (header(version=1), "is GGUF of version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "counts 1,152,921,504,606,846,976 tensors"),
        (header(("a", (4,), 0, 0)), "a would end at byte"),
        (header(("a", (1 << 62,), 0, 0)), "the shape"),
        (header(("a", (2,), 0, 0), ("a", (2,), 0, 0)) + bytes(64), "names a twice"),
        (header(("a", (2,) * 9, 0, 0)) + bytes(64), "9 dimensions"),
        (header(("a", (2,), 999, 0)) + bytes(64), "999|gguf"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 50), "has a text of"),
        (header(count=1, keys=struct.pack("<Q", 1) + b"k" + struct.pack("<I", 77)), "a value of type 77"),
        (header(count=1, keys=struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 1 << 40)), "an array of"),
        (header(count=1, keys=struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 0)), "aligned to 0"),
    ],
)
def test_damaged_gguf_is_refused(tmp_path, content, match):
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf", match)


def test_gguf_of_fewer_bits_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(header(("blocks.0.a.weight", (256, 128), 8, 0)) + bytes(272 * 128))
    refused(tmp_path / "x.gguf", "pip install gguf, or use an F16")
    (tmp_path / "y.gguf").write_bytes(header(("blocks.0.a.weight", (2, 3), 1, 0)) + bytes(12))
    assert FileSource(tmp_path / "y.gguf").tensor("blocks.0.a.weight").shape == (3, 2)


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "weight", "state"])
def test_parts_of_bitsandbytes_that_do_not_fit_are_refused(tmp_path, part):
    recorded = load_file(GOLDEN / "bitsandbytes.safetensors")
    file = {key: tensor for key, tensor in recorded.items() if key.startswith("nf4_nested_bf16.")}
    name = "nf4_nested_bf16.weight"
    if part == "state":
        file[f"{name}.quant_state.bitsandbytes__nf4"] = torch.frombuffer(
            bytearray(b'{"shape": [4]}'), dtype=torch.uint8
        )
    elif part == "weight":
        file[name] = file[name][:-1].contiguous()
    else:
        del file[f"{name}.{part}"]
    save_file(file, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", f"{name}, in 4 bits of bitsandbytes")


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(("blocks.0.a.weight", (64, 64), 1, 0)) + bytes(8192))
    source = FileSource(path)
    with path.open("r+b") as stream:
        stream.truncate(200)
    with pytest.raises(TensorFileError, match=r"blocks.0.a.weight ends early"):
        source.tensor("blocks.0.a.weight")
    with pytest.raises(TensorFileError, match=r"would be bytes"):
        raw_file.RawFile(path).read(0, 201, "it")


def test_the_folder_is_the_registry():
    assert list(KINDS) == ["folder", "gguf", "index", "safetensors", "torch"]
    assert gguf.KIND is KINDS["gguf"]


def test_the_command_line_opens_them(tmp_path):
    index = write_shards(tmp_path / "a", {f"blocks.{i}.proj.weight": torch.randn(128, 128) for i in range(2)}, 2)
    command = [
        sys.executable,
        "-m",
        "quantize",
        "quantize",
        str(index),
        str(tmp_path / "x.safetensors"),
        "--rank",
        "16",
    ]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "2 layers" in done.stdout, done.stderr
