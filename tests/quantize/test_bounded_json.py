"""Every JSON that is read: what is in bounds comes back, everything else is an error with a type, a file and a key."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svdquant_pack.kernels.backends.triton import tuned
from svdquant_pack.kernels.bounded_json import JsonError, Limits, read_json, read_object
from svdquant_pack.nodes.remote import CalibrateError, read_workflow
from svdquant_pack.quantize.calibration.file import Statistics, StatisticsError
from svdquant_pack.quantize.files.checkpoint import CheckpointError, Provenance
from svdquant_pack.quantize.files.dialects import native
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.tests.kernels.layers import random_layer

ROOT = Path(__file__).resolve().parents[2]
DEEP = "[" * 100_000
LAYER = random_layer("int4", 128, 128, 16, dtype=torch.bfloat16)


def test_what_json_writes_is_read():
    value = {"a": [1, -2.5, True, None, "ä"], "b": {"c": [[]]}, "d": 1 - (1 << 63)}
    assert read_json(json.dumps(value), "x") == value
    assert read_object(json.dumps(value).encode(), "x", {"a": list, "b": dict, "d": (int, float), "e": str}) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "deep"),
        ("[" * 80 + "]" * 80, "nests deeper than 64"),
        ('{"a":' * 50_000, "deep"),
        ("1" * 5000, "5000 digits"),
        ("-" + "1" * 20, "digits"),
        ("1e999", "finite"),
        ("NaN", "finite"),
        ("-Infinity", "finite"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
        ("[" + "0," * (1 << 20) + "0]", "items"),
        ('"' + "x" * ((1 << 20) + 1) + '"', "characters"),
        (" " * ((1 << 24) + 1), "bytes"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_place(text, message):
    start = time.process_time()
    with pytest.raises(JsonError, match=f"^here.*{message}"):
        read_json(text, "here")
    assert time.process_time() - start < 5


def test_a_value_of_another_type_is_named():
    for text, message in (("[]", "is a list, needed an object"), ('{"n": true}', "n is True, needed int")):
        with pytest.raises(JsonError, match=f"^here:? {message}"):
            read_object(text, "here", {"n": int})
    with pytest.raises(JsonError, match="s is 1, needed str or list"):
        read_object('{"s": 1}', "here", {"s": (str, list)})
    with pytest.raises(JsonError, match="at most 4"):
        read_object("[1, 2]", "here", limits=Limits(size=4))


HEADERS = {
    "deep recipe": ({"recipe": DEEP}, "recipe"),
    "recipe of another type": ({"recipe": "[]"}, "recipe"),
    "long number": ({"unet_config": '{"depth": %s}' % ("1" * 5000)}, "unet_config"),
    "version": ({"svdquant": '{"version": "x"}'}, "svdquant.*version"),
    "pinned": ({"svdquant": '{"pinned": [[]]}'}, "svdquant.*pinned"),
    "NaN": ({"recipe": '{"fallback": NaN}'}, "recipe"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_out_of_bounds_names_file_and_key(tmp_path, case):
    metadata, key = HEADERS[case]
    save_file(native.encode_layer("b.0", LAYER), tmp_path / "x.safetensors", metadata)
    with pytest.raises(CheckpointError, match=f"^x.safetensors: {key}"):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", [DEEP, '{"rank": %s}' % ("1" * 5000), "[]", " " * (1 << 17)])
def test_a_marker_out_of_bounds_names_file_and_layer(tmp_path, text):
    tensors = native.encode_layer("b.0", LAYER)
    tensors["b.0.comfy_quant"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "x.safetensors", native.metadata_of(Provenance(), {}))
    with pytest.raises(CheckpointError, match=r"^x.safetensors: layer 'b.0': comfy_quant"):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", ["5", DEEP, '{"version": []}', '{"version": 1, "shared": {"a": []}}', '{"runs": [1]}'])
def test_statistics_out_of_bounds_name_the_file(tmp_path, text):
    save_file({"a.tokens": torch.zeros(1)}, tmp_path / "s.safetensors", {"statistics": text})
    with pytest.raises(StatisticsError, match=r"^s.safetensors"):
        Statistics.open(tmp_path / "s.safetensors")


def test_a_configuration_that_is_none_is_no_configuration(tmp_path):
    for text in (DEEP, "[]", "1" * 5000):
        save_file({"blocks.0.proj.weight": torch.zeros(2, 2)}, tmp_path / "m.safetensors", {"config": text})
        assert FileSource(tmp_path / "m.safetensors").unet_config == {}


@pytest.mark.parametrize("text", [DEEP, "[]", '{"1": 2}', '{"nodes": []}', '{"1": {"inputs": []}}'])
def test_a_workflow_that_is_none_names_the_file(tmp_path, text):
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(CalibrateError, match=r"^w\.json"):
        read_workflow(tmp_path / "w.json")


@pytest.mark.parametrize("text", [DEEP, "1" * 5000, "[]", '{"a": 1}', "{"])
def test_tuned_settings_that_are_none_name_the_file(tmp_path, monkeypatch, text):
    """Lists in lists without end counted as no file, without a word."""
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path))
    tuned.path().parent.mkdir()
    tuned.path().write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tuned.path()))):
        tuned.read()


def test_json_is_read_in_one_place():
    for folder in ("kernels", "quantize", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "bounded_json.py":
                assert not re.search(r"json\.loads?\(", path.read_text(encoding="utf-8")), path
