"""A file that we wrote is read as it was written, or the error names the tensor or header string that is not."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.files.checkpoint import Checkpoint, CheckpointError, Provenance, new_checkpoint
from svdquant_pack.quantize.files.convert import TARGETS, convert_file
from svdquant_pack.quantize.files.dialects import native
from svdquant_pack.quantize.files.header import metadata_of
from svdquant_pack.quantize.files.integrity import KEY, METHOD
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.tensor_file import TensorFile, TensorFileError, TensorInfo, TensorWriter
from svdquant_pack.tests.kernels.layers import random_layer
from svdquant_pack.tests.quantize.stored_models import save_model, stored_model

LAYERS = {
    "blocks.0.proj": random_layer("int4", 128, 128, 16, dtype=torch.bfloat16),
    "blocks.1.proj": random_layer("int4", 128, 128, 16, dtype=torch.bfloat16, seed=1),
    "blocks.0.gelu": random_layer("int4", 128, 128, 32, (0, 128), torch.bfloat16),
    "blocks.2.proj": random_layer("nvfp4", 128, 128, 16),
    "blocks.3.proj": random_layer("int4", 128, 128, 16, dtype=torch.bfloat16, centred=True),
    "blocks.0.mod": random_layer("awq_w4a16", 128, 128, dtype=torch.bfloat16),
}
REST = {f"{name}.bias": torch.randn(layer.spec.n) for name, layer in LAYERS.items()}
REST |= {"head.weight": torch.randn(8, 128).bfloat16(), "norm.weight": torch.randn(8, 128).bfloat16()}


def write(path: Path) -> Path:
    with TensorWriter(path, {}) as writer:
        for name, layer in LAYERS.items():
            for key, tensor in native.encode_layer(name, layer).items():
                writer.add(key, tensor)
        for key, tensor in REST.items():
            writer.add(key, tensor)
        provenance = Provenance("generic", {"depth": 3}, (), {"rank": 16})
        writer.metadata |= metadata_of(provenance, {name: layer.spec for name, layer in LAYERS.items()})
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path / "x.safetensors")


def parts(path: Path) -> tuple[dict, bytearray]:
    """header and data of a file, as somebody sees them who knows safetensors and nothing of us"""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])


def edit(path: Path, change) -> Path:
    """change(header, data) -> None, or the new data"""
    header, data = parts(path)
    data = change(header, data) or data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def read_all(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.specs:
        checkpoint.layer(name)
    for name in checkpoint.rest:
        checkpoint.tensor(name)
    return checkpoint


def dropped(name):
    """Without the tensor, its bytes cut out: what a tool leaves that rewrites the file."""

    def change(header, data):
        start, stop = header.pop(name)["data_offsets"]
        for key, entry in header.items():
            if key != "__metadata__" and entry["data_offsets"][0] >= stop:
                entry["data_offsets"] = [place - (stop - start) for place in entry["data_offsets"]]
        return data[:start] + data[stop:]

    return change


def renamed(old, new):
    def change(header, _):
        header[new] = header.pop(old)

    return change


def swapped(a, b):
    def change(header, _):
        header[a], header[b] = header[b], header[a]

    return change


def stated(name, **entry):
    return lambda header, _: header[name].update(entry)


def overwritten(name, new):
    """Some of a tensor's bytes"""

    def change(header, data):
        start = header[name]["data_offsets"][0]
        data[start : start + len(new)] = new

    return change


def flipped(name, place=0):
    def change(header, data):
        data[header[name]["data_offsets"][0] + place] ^= 1

    return change


def replaced(name, old, new):
    def change(header, data):
        start, stop = header[name]["data_offsets"]
        text = bytes(data[start:stop])
        assert old in text
        data[start:stop] = text.replace(old, new)

    return change


def string(key, edit_text):
    """A string of the header, None to drop it"""

    def change(header, _):
        text = edit_text(header["__metadata__"].get(key))
        header["__metadata__"].pop(key, None)
        if text is not None:
            header["__metadata__"][key] = text

    return change


def added(header, data):
    header["extra.weight"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    return data + bytes(4)


NOTHING = torch.ones(1)
NAN = struct.pack("<H", 0x7FC1)
A, B = "blocks.0.proj", "blocks.1.proj"
DAMAGE = {  # what was done -> (how, what the error names)
    # what was accepted without a word
    "bias as I16": (stated(f"{A}.bias", dtype="I16", shape=[256]), f"{A}"),
    "bias as another float": (stated("head.weight", dtype="F16"), "head.weight"),
    "NaN in a 16-bit weight": (overwritten("head.weight", NAN), "head.weight"),
    "a 16-bit weight is gone": (dropped("head.weight"), "head.weight"),
    "weight_scale of two layers swapped": (swapped(f"{A}.weight_scale", f"{B}.weight_scale"), f"{A}.weight_scale"),
    "act_unsigned made false": (
        replaced("blocks.0.gelu.comfy_quant", b'"act_unsigned": true', b'"act_unsigned":false'),
        "blocks.0.gelu.comfy_quant",
    ),
    "weight_scale_2 renamed": (renamed("blocks.2.proj.weight_scale_2", "blocks.2.proj.input_scale"), "blocks.2.proj"),
    "weight_scale_2 renamed away": (renamed("blocks.2.proj.weight_scale_2", "spare.thing"), "weight_scale_2"),
    # and more of the kind
    "weight_scale_2 is gone": (dropped("blocks.2.proj.weight_scale_2"), "blocks.2.proj.weight_scale_2"),
    "both means are gone": (
        lambda header, data: dropped("blocks.3.proj.act_mean")(header, dropped("blocks.3.proj.out_mean")(header, data)),
        "blocks.3.proj.act_mean",
    ),
    "a bias is gone": (dropped(f"{A}.bias"), f"{A}.bias"),
    "a tensor that was not there": (added, "extra.weight"),
    "one bit of codes": (flipped(f"{B}.weight", 100), f"{B}.weight"),
    "one bit of a 16-bit tensor": (flipped("norm.weight", 3), "norm.weight"),
    "two 16-bit tensors swapped": (swapped("norm.weight", "head.weight"), "head.weight|norm.weight"),
    "another shape": (stated("head.weight", shape=[128, 8]), "head.weight"),
    "another family": (string("svdquant", lambda text: text.replace("generic", "flux")), "svdquant"),
    "another model configuration": (string("unet_config", lambda text: '{"depth": 4}'), "unet_config"),
    "another recipe": (string("recipe", lambda text: "{}"), "recipe"),
    "a string is gone": (string("recipe", lambda text: None), "recipe"),
    "checksums that are no JSON": (string(KEY, lambda text: text[:-1]), KEY),
    "checksums of another kind": (string(KEY, lambda text: text.replace(METHOD, "other")), KEY),
    "checksums that are no texts": (string(KEY, lambda text: '{"method": "crc32", "tensors": 1}'), KEY),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_was_changed_gets_a_name(path, kind):
    change, named = DAMAGE[kind]
    with pytest.raises(CheckpointError, match=rf"^x\.safetensors: .*({named})"):
        read_all(edit(path, change))


@pytest.mark.parametrize("change", [lambda header, data: None, string("modelspec.title", lambda text: "Mine")])
def test_a_file_that_was_not_changed_is_read_also_with_a_string_more(path, change):
    checkpoint = read_all(edit(path, change))
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in REST.items())
    assert KEY not in checkpoint.metadata and KEY not in TensorFile(path).metadata


def test_the_checksum_is_crc32_of_name_dtype_shape_and_bytes(path):
    """As it is written down, so that others can check it, too."""
    from zlib import crc32

    header, data = parts(path)
    written = json.loads(header.pop("__metadata__")[KEY])
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        about = json.dumps([name, entry["dtype"], entry["shape"]])
        assert written["tensors"].pop(name) == f"{crc32(data[start:stop], crc32(about.encode())):08x}"
    assert not written["tensors"] and written["strings"].keys() == {"svdquant", "unet_config", "recipe"}


@pytest.mark.parametrize("kind", ["as older versions write it", "as others write it"])
def test_a_file_without_checksums_has_its_other_checks(path, kind):
    tensors, metadata = load_file(path), TensorFile(path).metadata
    if kind == "as others write it":
        metadata = None
    save_file(tensors, path, metadata)
    assert not TensorFile(path).has_checksums
    read_all(path)
    edit(path, overwritten("head.weight", NAN))
    with pytest.raises(CheckpointError, match=r"head\.weight holds NaN"):
        read_all(path)


@pytest.mark.parametrize("to", TARGETS)
def test_whatever_is_written_has_checksums_of_its_own(path, tmp_path, to):
    flux = tmp_path / "flux.safetensors"
    save_model(flux, stored_model("flux"))
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    convert_file(flux, there, to)
    convert_file(there, back, "native")
    for file in (there, back):
        assert TensorFile(file).has_checksums
        read_all(file)
    name = next(name for name in TensorFile(there) if name.endswith("smooth_factor") or name.endswith("smooth"))
    edit(there, flipped(name, 5))
    with pytest.raises((CheckpointError, TensorFileError), match=name.rpartition(".")[2]):
        convert_file(there, tmp_path / "x2.safetensors", "native")
    assert not (tmp_path / "x2.safetensors").exists()


def test_every_problem_of_the_header_is_listed_where_it_is_asked_for(path):
    edit(path, dropped("head.weight"))
    edit(path, string("recipe", lambda text: "{}"))
    with pytest.raises(TensorFileError, match=r"head\.weight is gone, and 1 more"):
        TensorFile(path)
    problems = TensorFile(path, strict=False).problems
    assert problems == ["tensor head.weight is gone", "recipe in the header is not what was written"]


@pytest.fixture
def moved(monkeypatch):
    """Files whose header outgrew its room, which costs a copy of all the data"""
    made = []
    monkeypatch.setattr(TensorWriter, "_make_room", lambda self, room: made.append(self.path))
    return made


def test_a_plan_has_room_for_its_checksums(path, moved):
    plan = dict.fromkeys((f"transformer_blocks.{i}.attn.qkv.weight_scale" for i in range(2000)), TensorInfo.of(NOTHING))
    with TensorWriter(path, plan) as writer:
        for name in plan:
            writer.write(name, NOTHING)
    assert not moved and len(load_file(path)) == 2000


def test_a_new_checkpoint_has_room_for_what_is_said_of_its_layers(path, moved):
    layer = random_layer("nvfp4", 64, 64, 16, centred=True)
    names = [f"single_transformer_blocks.{i}.ff_context.net.0.proj" for i in range(500)]
    with new_checkpoint(path, [layer.spec] * 500, [TensorInfo((64,), torch.float32)] * 500) as writer:
        for name in names:
            for key, tensor in (native.encode_layer(name, layer) | {f"{name}.bias": torch.zeros(64)}).items():
                writer.add(key, tensor)
        writer.metadata |= metadata_of(Provenance(unet_config={"depth": [1] * 100}), dict.fromkeys(names, layer.spec))
    assert not moved and len(open_checkpoint(path).specs) == 500


WITHOUT = {  # what shows without checksums too: (what was done, what the error says)
    "bias as I16": (stated(f"{A}.bias", dtype="I16", shape=[256]), rf"{A}.*(shape|dtype)"),
    "a weight as I16": (stated("head.weight", dtype="I16"), r"head\.weight has dtype int16"),
    "NaN in a 16-bit weight": (overwritten("head.weight", NAN), r"head\.weight holds NaN"),
    "weight_scale_2 renamed": (
        renamed("blocks.2.proj.weight_scale_2", "blocks.2.proj.input_scale"),
        r"layer 'blocks\.2\.proj': input_scale is not part of a 4-bit layer",
    ),
    "weight_scale_2 of no layer": (
        renamed("blocks.2.proj.weight_scale_2", "blocks.9.proj.weight_scale_2"),
        r"blocks\.9\.proj\.weight_scale_2 belongs to a 4-bit layer",
    ),
    "smooth_factor renamed": (
        renamed(f"{A}.smooth_factor", f"{A}.smooth"),
        r"layer 'blocks\.0\.proj': smooth is not part of a 4-bit layer",
    ),
}


@pytest.mark.parametrize("dialect", ["native", "kitchen"])
@pytest.mark.parametrize("kind", WITHOUT)
def test_what_shows_without_checksums_is_refused_in_the_files_of_others(path, dialect, kind):
    edit(path, string(KEY, lambda text: None))
    change, said = WITHOUT[kind]
    if dialect == "kitchen":
        tensors = {name: part for name, part in load_file(path).items() if not name.startswith("blocks.2.proj")}
        named = {name.replace(".proj_", ".weight_proj_"): part for name, part in tensors.items()}
        save_file(named, path)
        if kind.startswith("weight_scale_2"):
            change, said = renamed(f"{A}.weight_scale", f"{A}.scale"), r"layer 'blocks\.0\.proj': scale is not part"
    assert read_all(path).dialect == dialect
    with pytest.raises(CheckpointError, match=rf"^x\.safetensors: .*{said}"):
        read_all(edit(path, change))
