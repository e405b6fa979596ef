"""Damaged input of every kind: what was written, or one error with a type that names it; see fuzzing.py.

Never another exception, a traceback on the command line, more than 5 s, more memory than twice the file, a file left
behind, or other numbers without a word. Numbers changed under a header that is right are seen in files with checksums;
in others only NaN and Inf are.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from svdquant_pack.kernels.backends.triton import tuned
from svdquant_pack.kernels.layer import Layer
from svdquant_pack.quantize.calibration.file import Statistics, StatisticsError
from svdquant_pack.quantize.calibration.tokens import ModelCall
from svdquant_pack.quantize.families import FamilyError
from svdquant_pack.quantize.files import integrity, spelling
from svdquant_pack.quantize.files.checkpoint import Checkpoint, CheckpointError
from svdquant_pack.quantize.files.convert import TARGETS, convert_file
from svdquant_pack.quantize.files.dialects import kitchen, native
from svdquant_pack.quantize.files.dialects.nunchaku.layers import PARTS
from svdquant_pack.quantize.files.encodings.fp8 import FP8
from svdquant_pack.quantize.files.open import open_checkpoint
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.files.tensor_file import TensorFileError, TensorInfo
from svdquant_pack.quantize.maker.work_folder import WorkFolder
from svdquant_pack.quantize.recipe import NAMED, Recipe
from svdquant_pack.tests.kernels.layers import random_layer
from svdquant_pack.tests.quantize import fuzzing
from svdquant_pack.tests.quantize.fuzzing import command, fuzz, nothing_left
from svdquant_pack.tests.quantize.mutations import KINDS, PAYLOAD, File, damage, hostile, odd_value
from svdquant_pack.tests.quantize.stored_models import legacy_folder, quantization_config, save_model, stored_model
from svdquant_pack.tests.quantize.test_layout import same_bytes

LAYERS = {
    "blocks.0.proj": random_layer("int4", 128, 128, 16, dtype=torch.bfloat16),
    "blocks.0.gelu": random_layer("int4", 128, 128, 32, (0, 128), torch.bfloat16),
    "blocks.0.mod": random_layer("awq_w4a16", 128, 128, dtype=torch.bfloat16),
}
LAYER_SUFFIXES = {*PARTS, *spelling.PARTS, *kitchen.PARTS} - {"bias"}
ERRORS = (CheckpointError, TensorFileError, StatisticsError, FamilyError)
OPTIONAL = ("|wtscale", "|wcscales", "|act_mean", "|out_mean")  # without checksums nobody knows that they were there
ROOT = Path(__file__).resolve().parents[2]
Tensors = dict[str, torch.Tensor]


def _model(layers: dict[str, Layer], encode: Callable[[str, Layer], Tensors]) -> Tensors:
    tensors = {key: tensor for name, layer in layers.items() for key, tensor in encode(name, layer).items()}
    return tensors | {f"{name}.bias": torch.zeros(layer.spec.n) for name, layer in layers.items()}


def native_file(folder: Path) -> Path:
    """As the pack itself writes one."""
    layers = LAYERS | {"blocks.1.proj": random_layer("nvfp4", 128, 128, 16)}
    save_model(folder / "plain.safetensors", _model(layers, native.encode_layer) | {"head.weight": torch.ones(8, 128)})
    convert_file(folder / "plain.safetensors", folder / "native.safetensors", "native")
    (folder / "plain.safetensors").unlink()
    return folder / "native.safetensors"


def kitchen_file(folder: Path) -> Path:
    tensors = _model(LAYERS, lambda name, layer: kitchen.encode_layer(name, layer, tile_packed=name.endswith("proj")))
    return save_model(folder / "kitchen.safetensors", tensors)


def nunchaku(family: str, precision: str = "int4", lite: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        metadata = {} if lite else quantization_config(precision)
        return save_model(folder / f"{family}.safetensors", stored_model(family, precision, lite=lite), metadata)

    return make


CHECKPOINTS = {  # name -> (how it is made, share)
    "native": (native_file, 160),
    "kitchen": (kitchen_file, 100),
    "flux int4": (nunchaku("flux"), 100),
    "flux nvfp4": (nunchaku("flux", "nvfp4"), 100),
    "flux lite": (nunchaku("flux", lite=True), 60),
    "qwen_image int4": (nunchaku("qwen_image"), 70),
    "z_image nvfp4": (nunchaku("z_image", "nvfp4"), 60),
    "sdxl int4": (nunchaku("sdxl"), 60),
}


def read_all(checkpoint: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in checkpoint.specs:
        layer = checkpoint.layer(name)
        found[name] = layer.spec
        found |= {f"{name}|{part}": tensor for part, tensor in layer.tensors.items()}
    return found | {name: checkpoint.tensor(name) for name in checkpoint.rest}


def assert_same(found: dict[str, Any], wanted: dict[str, Any], values: bool = True) -> None:
    """The same tensors; without `values` of the same shapes."""
    assert found.keys() == wanted.keys(), f"other names: {sorted(found.keys() ^ wanted.keys())[:4]}"
    for key, value in wanted.items():
        if not isinstance(value, torch.Tensor):
            assert found[key] == value, f"{key} is {found[key]}, written was {value}"
        elif values:
            assert same_bytes(found[key], value), f"{key} is not what was written"
        else:
            assert found[key].shape == value.shape, f"{key} has another shape"


def assert_plausible(found: dict[str, Any], wanted: dict[str, Any], done: list[str], any_names: bool = False) -> None:
    """As far as can be known without checksums: the same 4-bit layers, and 16-bit tensors as their header says.

    What forms those have only the model knows that the host builds. any_names: nor which of them there are.
    """
    kinds = {each.partition(" of ")[0] for each in done}
    for key, value in wanted.items():
        of_layer = "|" in key or not isinstance(value, torch.Tensor)
        if not of_layer and key in found and TensorInfo.of(found[key]) != TensorInfo.of(value):
            found[key] = value
        if key not in found and (any_names or key.endswith(OPTIONAL)):
            assert not of_layer or key.endswith(OPTIONAL) or "drop layer" in kinds, f"{key} is not there"
            found[key] = value
    # nor does anybody know that an optional one was not there
    known = {key: value for key, value in found.items() if key in wanted or not (any_names or key.endswith(OPTIONAL))}
    assert_same(known, wanted, not kinds & PAYLOAD.keys())


def is_checked(file: File, original: File) -> bool:
    """Whether the file still has the checksums that it was written with: then every damage is seen."""
    checksums = original.metadata.get(integrity.KEY)
    return checksums is not None and file.metadata.get(integrity.KEY) == checksums


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_damaged_checkpoint_is_the_original_or_an_error(tmp_path, record_property, name):
    make, share = CHECKPOINTS[name]
    path = make(tmp_path)
    original, wanted = File(path), read_all(open_checkpoint(path))
    target = tmp_path / "damaged.safetensors"
    ours = name in ("native", "kitchen")  # whose names are anybody's: a 16-bit tensor may be there or not

    def check(rng: Random) -> tuple[str, list[str]]:
        file = File(path)
        names = list(file.header)
        if ours and not is_checked(file, original):
            names = [each for each in names if each.rpartition(".")[2] in LAYER_SUFFIXES]
        done = damage(file, rng, names, list(KINDS))
        file.write(target)
        try:
            found = read_all(open_checkpoint(target))
        except ERRORS as error:
            outcome = "refused"
            assert target.name in str(error), f"{error} ({done})"
        else:
            outcome = "read"
            try:
                if is_checked(file, original):
                    assert_same(found, wanted)
                else:
                    assert_plausible(found, wanted, done, any_names=ours)
            except AssertionError as error:
                raise AssertionError(f"{error} ({done})") from error
        if not rng.randrange(4):
            run_command(target, rng, done)
        return outcome, done

    with nothing_left(tmp_path):
        counts = fuzz(name, share, check, path.stat().st_size)
        target.unlink()
    record_property("figures", counts)


def run_command(path: Path, rng: Random, done: list[str], names: Sequence[str] = ()) -> None:
    """One command of the command line reads the damaged file: exit code and one line; what it writes can be read."""
    out = path.with_name("out.safetensors")
    arguments = rng.choice(
        [
            ("inspect", path),
            ("inspect", path, "--json"),
            ("verify", path),
            ("convert", path, out, "--to", rng.choice(TARGETS)),
            ("convert", path, out, "--to", rng.choice(TARGETS), "--as-is", "--json"),
            ("quantize", path, out, "--json", "--rank", 16),
            ("compare", path, path),
        ]
    )
    words = [str(each) for each in arguments]
    try:
        with nothing_left(path.parent):
            code, said = command(*arguments)
            if code == 0 and out in arguments:
                read_all(open_checkpoint(out, as_is="--as-is" in arguments))
            out.unlink(missing_ok=True)
            assert code != 1 or any(name in said for name in names or [path.name]), f"the error names no file: {said}"
    except Exception as error:
        out.unlink(missing_ok=True)
        raise AssertionError(f"{words[0]} {words[2:]} after {done}: {type(error).__name__}: {error}") from error


# -- folders of files


def diffusers_folder(folder: Path, single: Path) -> Path:
    folder.mkdir()
    file = File(single)
    tensors = file.tensors()
    names = sorted(tensors)
    for place, part in enumerate((names[::2], names[1::2]), 1):
        save_model(
            folder / f"diffusion_pytorch_model-{place:05d}-of-00002.safetensors",
            {name: tensors[name] for name in part},
            file.metadata,
        )
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    return folder


@pytest.mark.parametrize("kind", ["legacy", "diffusers"])
def test_a_damaged_folder_is_the_original_or_an_error(tmp_path, record_property, kind):
    """One of its files, or the JSON beside them."""
    single = nunchaku("flux")(tmp_path)
    if kind == "legacy":
        metadata = {**quantization_config(), "config": "{}", "comfy_config": '{"model_class": "Flux"}'}
        single = save_model(single, stored_model("flux"), metadata)
    folder = (legacy_folder if kind == "legacy" else diffusers_folder)(tmp_path / "folder", single)
    wanted = read_all(open_checkpoint(folder))
    texts = {path: path.read_bytes() for path in folder.iterdir()}

    def check(rng: Random) -> tuple[str, list[str]]:
        path = rng.choice(sorted(texts))
        if path.suffix == ".json":
            path.write_text(hostile(texts[path].decode(), rng), encoding="utf-8", errors="surrogatepass")
            done = [f"JSON of {path.name}"]
        else:
            file = File(path)
            done = damage(file, rng, list(file.header), list(KINDS))
            file.write(path)
        try:
            assert_plausible(read_all(open_checkpoint(folder)), wanted, done)
            outcome = "read"
        except ERRORS as error:
            assert any(name in str(error) for name in (path.name, folder.name)), f"{error} ({done})"
            outcome = "refused"
        except AssertionError as error:
            path.write_bytes(texts[path])
            raise AssertionError(f"{error} ({done} of {path.name})") from error
        try:
            if not rng.randrange(8):
                run_command(folder, rng, done, (folder.name, path.name))
        finally:
            path.write_bytes(texts[path])
        return outcome, done

    record_property("figures", fuzz(f"{kind} folder", 60, check, sum(map(len, texts.values()))))
    assert {path: path.read_bytes() for path in folder.iterdir()} == texts


# -- 16-bit and fp8 sources


def source_tensors(fp8: bool) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for block in range(2):
        for layer in ("proj", "mlp"):
            name, weight = f"blocks.{block}.{layer}", torch.randn(128, 128, generator=generator)
            tensors[f"{name}.weight"] = weight.to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
            tensors[f"{name}.bias"] = torch.randn(128, generator=generator).bfloat16()
            if fp8:
                scale = torch.rand(128 if block else (), generator=generator) + 0.5
                tensors[f"{name}.{'scale_weight' if layer == 'proj' else 'weight_scale'}"] = scale
    return tensors | {"head.weight": torch.randn(8, 128, generator=generator).half()}


SOURCES = {
    "16 bit": (False, "", 1),
    "fp8": (True, "", 1),
    "16 bit in shards": (False, "model.diffusion_model.", 3),
    "fp8 in shards": (True, "diffusion_model.", 2),
}


def as_source(stored: Tensors) -> Callable[[str], list[torch.Tensor]]:
    """What a source may give for a name, from what a file holds: the tensor, times the scale that lies beside it."""

    def values(key: str) -> list[torch.Tensor]:
        found = []
        for name in (each for each in stored if each == key or each.endswith(f".{key}")):
            tensor = stored[name]
            if tensor.dtype in FP8:
                beside = [
                    stored.get(f"{name.removesuffix('weight')}{suffix}") for suffix in ("scale_weight", "weight_scale")
                ]
                scale = next((each for each in beside if each is not None), torch.ones(()))
                scale = scale.float().reshape(-1, 1) if scale.numel() > 1 else scale.float().reshape(())
                tensor = (tensor.float() * (scale if name.endswith("weight") else 1)).to(torch.bfloat16)
            found.append(tensor)
        return found

    return values


@pytest.mark.parametrize("name", SOURCES)
def test_a_damaged_source_is_what_it_holds_or_an_error(tmp_path, record_property, name):
    fp8, prefix, count = SOURCES[name]
    tensors = {f"{prefix}{key}": tensor for key, tensor in source_tensors(fp8).items()}
    names = sorted(tensors)
    files = [tmp_path / "model.safetensors"]
    if count > 1:
        files = [tmp_path / f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    config = {"config": '{"image_model": "flux"}'}
    for place, path in enumerate(files):
        save_file({key: tensors[key] for key in names[place::count]}, path, config)
    texts = {path: path.read_bytes() for path in files}

    def check(rng: Random) -> tuple[str, list[str]]:
        path = rng.choice(files)
        file = File(path)
        done = damage(file, rng, list(file.header), list(KINDS))
        file.write(path)
        try:
            source = FileSource(files[0])
            found = {key: source.tensor(key) for key in source.infos}
            outcome = "read"
            stored = {key: tensor for each in files for key, tensor in File(each).tensors().items()}
            values = as_source(stored)
            for key, tensor in found.items():
                assert source.infos[key].shape == tensor.shape and source.infos[key].dtype == tensor.dtype
                assert any(same_bytes(tensor, value) for value in values(key)), f"{key} is not what the file holds"
            if not rng.randrange(3):
                run_command(files[0], rng, done, [each.name for each in files])
        except ERRORS as error:
            assert any(each.name in str(error) for each in files), f"{error} ({done})"
            outcome = "refused"
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} ({done})") from error
        finally:
            path.write_bytes(texts[path])
        return outcome, done

    with nothing_left(tmp_path):
        record_property("figures", fuzz(name, 75, check, sum(map(len, texts.values()))))


# -- statistics


def statistics_file(path: Path) -> Path:
    made = Statistics.create(path, {"blocks.0.proj": 128, "blocks.0.mlp": 128}, 64, {"family": "generic", "runs": []})
    generator = torch.Generator().manual_seed(0)
    for entry in made.entries.values():
        entry.observe(torch.randn(1, 200, 128, generator=generator), ModelCall(1, 8), generator)
    made.metadata["shared"] = {"blocks.1.proj": "blocks.0.proj"}
    made.add_run(id="1", steps=8)
    return path


def entries_of(statistics: Statistics) -> dict[str, Any]:
    layers = [*statistics.entries, *statistics.metadata.get("shared", {})]
    found = {layer: statistics.of_group([layer]) for layer in layers}
    return {f"{layer}.{part.name}": getattr(e, part.name) for layer, e in found.items() if e for part in fields(e)}


def test_damaged_statistics_are_what_they_hold_or_an_error(tmp_path, record_property):
    path = statistics_file(tmp_path / "s.safetensors")
    save_file(
        {f"{key.replace('head', 'blocks.1.x')}": value for key, value in source_tensors(False).items()},
        tmp_path / "m.safetensors",
    )
    original, wanted, target = File(path), entries_of(Statistics.open(path)), tmp_path / "damaged.safetensors"
    out = tmp_path / "out.safetensors"
    commands = [
        ("inspect", target),
        ("inspect", target, "--json"),
        ("verify", target),
        ("merge", out, target),
        ("merge", out, path, target),
    ]
    quantize = ("quantize", tmp_path / "m.safetensors", out, "--json", "--rank", 16, "--statistics", target)
    commands += [(*quantize, "--recipe", recipe) for recipe in ("svdquant", "svdquant+gptq")]

    def check(rng: Random) -> tuple[str, list[str]]:
        file = File(path)
        done = damage(file, rng, list(file.header), list(KINDS))
        file.write(target)
        try:
            found = entries_of(Statistics.open(target))
            outcome = "read"
            if is_checked(file, original):
                assert_same(found, wanted)
            stored = file.tensors()
            for key, tensor in found.items():
                name = key if key in stored else key.replace("blocks.1.proj", "blocks.0.proj")
                assert same_bytes(tensor, stored[name]), f"{key} is not what the file holds"
        except ERRORS as error:
            outcome = "refused"
            assert target.name in str(error), f"{error} ({done})"
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} ({done})") from error
        if not rng.randrange(3):
            arguments = rng.choice(commands)
            try:
                with nothing_left(tmp_path):
                    code, said = command(*arguments)
                    assert code != 1 or ".safetensors" in said or "layer" in said, f"the error names no file: {said}"
                    out.unlink(missing_ok=True)
            except Exception as error:
                words = [str(each) for each in arguments]
                raise AssertionError(f"{words} after {done}: {type(error).__name__}: {error}") from error
        return outcome, done

    with nothing_left(tmp_path):
        record_property("figures", fuzz("statistics", 160, check, path.stat().st_size))
        target.unlink()


# -- finished layers of a stopped run


def test_a_damaged_work_folder_is_what_was_kept_or_nothing(tmp_path, record_property):
    tensors = native.encode_layer("blocks.0.proj", LAYERS["blocks.0.proj"])
    record = {"blocks.0.proj": {"shape": [128, 128], "error": 0.1, "by_bucket": [None, 0.25]}}
    work = WorkFolder.beside(tmp_path / "x.safetensors")
    with work:
        work.keep("key", tensors, record)
    path = work.path / "key.safetensors"
    raw = path.read_bytes()

    def check(rng: Random) -> tuple[str, list[str]]:
        path.write_bytes(raw)
        file = File(path)
        done = damage(file, rng, list(file.header), list(KINDS))
        file.write(path)
        found = work.find("key")
        if found is None:
            return "not taken up", done
        assert found[1] == record, done
        assert_same(found[0], tensors)
        return "taken up", done

    with nothing_left(tmp_path):
        record_property("figures", fuzz("work folder", 100, check, len(raw)))


# -- settings


def test_a_recipe_is_valid_or_refused_by_field(record_property):
    names = [field.name for field in fields(Recipe)]

    def check(rng: Random) -> tuple[str, list[str]]:
        changes = {rng.choice(names): odd_value(rng) for _ in range(rng.choice([1, 1, 2]))}
        name = changes.pop("name", rng.choice(list(NAMED)))
        try:
            recipe = Recipe.named(name, **changes)
        except ValueError as error:
            assert any(key in str(error) for key in (*changes, "recipe", "smoothing")), error
            return "refused", [f"{key} of a recipe" for key in changes]
        json.loads(json.dumps(recipe.as_dict(), allow_nan=False))
        assert len(recipe.hash()) == 64
        return "made", [f"{key} of a recipe" for key in changes]

    record_property("figures", fuzz("recipe", 100, check))


OPTIONS = {
    "--format": ["int4", "nvfp4", "INT4", ""],
    "--rank": ["16", "0", "auto", "-16", "33", "1e3", "٣٢", "-", "--", "", "9" * 4400, "512"],
    "--recipe": ["fast", "balanced", "svdquant", "slow"],
    "--statistics": ["s.safetensors", "no.safetensors", "m.safetensors", ".", "\0", ""],
    "--activation": ["stock", "best", "x"],
    "--target-size": ["nan", "inf", "-inf", "-1", "1e-9", "0.0001", "1e300", "x", "1_0"],
    "--fallback": ["nan", "inf", "-1", "1e-9", "1e308", "0.5", ""],
    "--act8-share": ["nan", "2", "-0.0", "0.5", "x"],
    "--seed": ["-1", "9223372036854775807", "9223372036854775808", "9" * 4400, "x", "1.0"],
    "--device": ["cpu", "cuda:99", "meta", "x", "", "cpu:-1"],
    "--report": ["m.safetensors", "\0", ".", "a" * 300],
}


def test_odd_arguments_are_one_line_and_an_exit_code(tmp_path, record_property, monkeypatch):
    save_file(source_tensors(False), tmp_path / "m.safetensors")
    statistics_file(tmp_path / "s.safetensors")
    native_file(tmp_path)
    shutil.copy(ROOT / "workflows" / "api" / "quantize_your_model.json", tmp_path / "w.json")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    # what is imported by the first run of all steps is not what an input takes
    assert command("quantize", "m.safetensors", "out", "--statistics", "s.safetensors", "--report", "report")[0] == 0
    (tmp_path / "out").unlink()
    shutil.rmtree(tmp_path / "report")
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    paths = [
        "m.safetensors",
        "native.safetensors",
        "s.safetensors",
        "folder",
        "no.safetensors",
        "",
        ".",
        "\0",
        "x" * 300,
        "\udc80",
    ]
    outs = [
        "out.safetensors",
        "folder",
        "folder/out.safetensors",
        "m.safetensors",
        "x" * 300,
        "\0",
        "",
        "no/out",
        "/proc/x",
        "\udc80",
    ]

    def check(rng: Random) -> tuple[str, list[str]]:
        verb = rng.choice(
            ["inspect", "convert", "quantize", "quantize", "quantize", "compare", "merge", "clean", "calibrate", "tune"]
        )
        usual = {"quantize": "m.safetensors", "calibrate": "w.json"}.get(verb, "native.safetensors")
        source = rng.choice([usual, usual, *paths])
        out = rng.choice(["out.safetensors", "out.safetensors", *outs])
        arguments = {
            "inspect": [source],
            "convert": [source, out, "--to", rng.choice([*TARGETS, "x"])],
            "quantize": [source, out],
            "compare": [source, rng.choice(paths)],
            "merge": [out, source, rng.choice(paths)],
            "clean": [source, "--dry-run"],
            "calibrate": [
                source,
                "--server",
                rng.choice(["http://127.0.0.1:9", "x", "ftp://x", "http://[", "http://\0"]),
                "--count",
                rng.choice(["1", "-1", "x"]),
            ],
            "tune": ["--model", source],
        }[verb]
        if verb == "quantize":
            for _ in range(rng.choice([1, 1, 2])):
                key = rng.choice(list(OPTIONS))
                arguments += [key, rng.choice(OPTIONS[key])]
        done = [f"{verb} of {' '.join(arguments):.200}"]
        try:
            code, _ = command(verb, *arguments)
        except Exception as error:
            raise AssertionError(f"{done}: {type(error).__name__}: {error}") from error
        finally:
            for path in [*tmp_path.rglob("*")]:
                if path.is_file() and path not in kept:
                    assert not path.name.startswith("."), f"{done}: left {path.name}"
                    path.unlink()
            for path in tmp_path.iterdir():
                if path.is_dir() and path.name != "folder":
                    shutil.rmtree(path)
            assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == kept, done
        return f"exit {code}", done

    record_property("figures", fuzz("arguments", 150, check))


# -- JSON


def test_every_json_that_is_read_is_in_bounds_or_refused_by_place(tmp_path, record_property, monkeypatch):
    """Deep, endless, doubled, cut, of another type: in headers, markers, files beside them, and answers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuned.path().parent.mkdir(parents=True)
    checkpoint, source = native_file(tmp_path), tmp_path / "m.safetensors"
    save_file(source_tensors(False), source, {"config": '{"image_model": "flux", "depth": 2}'})
    statistics = statistics_file(tmp_path / "s.safetensors")
    target, out = tmp_path / "damaged.safetensors", tmp_path / "out.safetensors"
    workflow = tmp_path / "damaged.json"
    shipped = (ROOT / "workflows" / "api" / "quantize_your_model.json").read_text()
    tables = {"a GPU, triton 3.6.0": {"gemm": [{"arch": "sm_90", "rows": 16, "block_m": 16}]}}

    def header(path: Path, keys: Sequence[str]) -> Callable[[Random], str]:
        def make(rng: Random) -> str:
            file = File(path)
            key = rng.choice(keys)
            file.metadata[key] = hostile(file.metadata.get(key), rng)
            file.write(target)
            return key

        return make

    def marker(rng: Random) -> str:
        file = File(checkpoint)
        KINDS["marker"](file, next(iter(file.header)), list(file.header), rng)
        file.write(target)
        return "marker"

    def text(path: Path, usual: str) -> Callable[[Random], str]:
        def make(rng: Random) -> str:
            path.write_bytes(hostile(usual, rng).encode(errors="surrogatepass"))
            return path.name

        return make

    def tune(rng: Random) -> int:
        try:
            tuned.read()
            return 0
        except ValueError as error:
            assert str(tuned.path()) in str(error), error
            return 1

    url = "http://127.0.0.1:9"
    ours = ["svdquant", integrity.KEY, "unet_config", "recipe", "quantization_config", "_quantization_metadata"]
    cases: list[tuple[Callable[[Random], str], Any]] = [
        (header(checkpoint, ours), ("inspect", target)),
        (header(checkpoint, ours), ("verify", target)),
        (header(checkpoint, ours), ("convert", target, out, "--to", "kitchen")),
        (header(source, ["config"]), ("quantize", target, out, "--json", "--rank", 16)),
        (header(statistics, ["statistics"]), ("inspect", target)),
        (header(statistics, ["statistics"]), ("merge", out, target)),
        (marker, ("inspect", target)),
        (marker, ("convert", target, out, "--to", "native")),
        (text(workflow, shipped), ("calibrate", workflow, "--server", url)),
        (text(tuned.path(), json.dumps(tables)), tune),
    ]

    def check(rng: Random) -> tuple[str, list[str]]:
        make, arguments = rng.choice(cases)
        place = make(rng)
        done = [place, "tune" if callable(arguments) else str(arguments[0])]
        try:
            if callable(arguments):
                code, said = arguments(rng), "damaged"
            else:
                code, said = command(*arguments)
                if code == 0 and out.exists():
                    read_all(open_checkpoint(out)) if arguments[0] != "merge" else Statistics.open(out)
            assert code != 1 or "damaged" in said or url in said or "workflow" in said, f"names no file: {said}"
        except Exception as error:
            raise AssertionError(f"{done}: {type(error).__name__}: {error}") from error
        finally:
            out.unlink(missing_ok=True)
        return f"exit {code}", done

    record_property("figures", fuzz("JSON", 200, check, source.stat().st_size))
    assert not list(tmp_path.rglob(".*"))


# -- the harness itself


def _endless(rng: Random) -> tuple[str, list[str]]:
    while True:
        rng.random()


def _large(rng: Random) -> tuple[str, list[str]]:
    return str(len(bytearray(b"x" * (200 << 20)))), []


def _wrong(rng: Random) -> tuple[str, list[str]]:
    raise KeyError("a")


@pytest.mark.parametrize(
    ("check", "said"), [(_endless, "ran for more than 0.2 s"), (_large, "bytes of memory"), (_wrong, "KeyError: 'a'")]
)
def test_what_must_not_be_is_seen_and_named(monkeypatch, check, said):
    if check is _large and not fuzzing.PEAK.exists():
        pytest.skip("this system does not say how much memory a process took")
    if check is _endless:
        monkeypatch.setattr(fuzzing, "LONGEST", 0.2)
    monkeypatch.setattr(fuzzing, "COUNT", 1)
    with pytest.raises(AssertionError, match=rf"harness, input 0 of seed {fuzzing.SEED}: .*{said}"):
        fuzz("harness", 1, check)


def test_a_file_left_behind_is_seen(tmp_path):
    with pytest.raises(AssertionError, match=r"left behind: \{'x'\}"), nothing_left(tmp_path):
        (tmp_path / "x").touch()
