"""What `make soak` sends: prompts of every node, each with what may come of it, and the files that they read."""

import contextlib
import json
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.host.server import Host
from svdquant_pack.tests.quantize.loopback_hub import Hub
from svdquant_pack.tests.quantize.test_names import BAD

ROOT = Path(__file__).resolve().parents[1]
DEMO = "svdquant_demo_digits.safetensors"
LORAS = ("svdquant_demo_inverted_kohya.safetensors", "svdquant_demo_inverted_diffusers.safetensors")
NAN_LORA = "nan.safetensors"
DIALECTS = (("int4", "native"), ("int4", "nunchaku"), ("int4", "kitchen"), ("nvfp4", "native"), ("nvfp4", "nunchaku"))
COMPUTES = {"int4": ("auto", "w4a4", "w4a8", "w8a8", "w16"), "nvfp4": ("auto", "w4a4", "w8a8", "w16")}
TARGETS = tuple(f"soak_{number}.safetensors" for number in range(3))  # few: several clients write the same one
STATISTICS = ("soak_a", "soak_b")
SMALL = "small"  # the folder on a disk that is full
SWAPPED, MOVED, DOWNLOADED = "swapped.safetensors", "moved.safetensors", "model.safetensors"
SWAPPED_FOR = ("int4_native.safetensors", "nvfp4_native.safetensors")
NOT_THERE = ("is not in models/diffusion_models", "needed one of the list|Value not in list|value_not_in_list")
TAKEN = ("exists already", "is writing the same file")

Graph = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Combination:
    """What decides every pixel of a picture."""

    model: str
    loras: tuple[tuple[str, float], ...]
    compute: str
    seed: int


@dataclass(frozen=True)
class Job:
    """One prompt.

    pictures   the result shows one of these; nothing is known of it where there are none
    said       patterns: the text of a refusal or a failure matches one of them
    must_fail  it may not succeed
    target     the file in models/diffusion_models that it writes
    fault      what is done to the server's files or connections just before it is queued
    interrupt  seconds after its start at which it is interrupted
    """

    kind: str
    graph: Graph
    pictures: tuple[Combination, ...] = ()
    said: tuple[str, ...] = ()
    must_fail: bool = False
    target: str = ""
    fault: Callable[[Host], object] | None = None
    interrupt: float | None = None


def paint(combination: Combination, steps: int = 2) -> Graph:
    """Two pictures of a 4-bit model with any number of LoRAs."""
    graph: Graph = {
        "model": node("SVDQuantLoadModel", model_name=combination.model, compute=combination.compute),
        **_sampling(combination.seed, steps),
    }
    model = ["model", 0]
    for number, (name, strength) in enumerate(combination.loras):
        graph[f"lora{number}"] = node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)
        model = [f"lora{number}", 0]
    graph["sampler"]["inputs"]["model"] = model
    return graph


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _sampling(seed: int, steps: int) -> Graph:
    usual = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    ends = {"model": ["model", 0], "positive": ["prompt", 0], "negative": ["prompt", 0], "latent_image": ["latent", 0]}
    return {
        "prompt": node("SVDQuantDemoPrompt", digits="0123456789"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=2),
        "sampler": node("KSampler", seed=seed, steps=steps, **usual, **ends),
        "decode": node("SVDQuantDemoDecode", samples=["sampler", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="soak"),
    }


def quantize(file_name: str, **inputs: Any) -> Graph:
    inputs = {"source": DEMO, "format": "int4", "rank": 16, "recipe": "fast", **inputs}
    return {"1": node("SVDQuantQuantizeModel", file_name=file_name, **inputs)}


def convert(file_name: str, **inputs: Any) -> Graph:
    inputs = {"model_name": "int4_native.safetensors", "to": "nunchaku", **inputs}
    return {"1": node("SVDQuantConvertModel", file_name=file_name, **inputs)}


def bake(file_name: str, **inputs: Any) -> Graph:
    return {
        "1": node("SVDQuantLoadModel", model_name="int4_native.safetensors", compute="auto"),
        "2": node("LoraLoaderModelOnly", model=["1", 0], lora_name=LORAS[0], strength_model=0.5),
        "3": node("SVDQuantBakeLora", model=["2", 0], file_name=file_name, **{"refit": False, **inputs}),
    }


def calibrate(file_name: str, seed: int = 0, target: str = "", **inputs: Any) -> Graph:
    """Sample a 16-bit model while it is watched, and quantize it to `target` if that is given."""
    graph = {"model": node("SVDQuantDemoModel", model_name=DEMO), **_sampling(seed, 2)}
    inputs = {"tokens": 256, "disk_gb": 0.1, "start_over": False, **inputs}
    graph["watch"] = node("SVDQuantCalibrate", model=["model", 0], file_name=file_name, **inputs)
    graph["sampler"]["inputs"]["model"] = ["watch", 0]
    if target:
        read = {"statistics": ["watch", 1], "after": ["sampler", 0], "overwrite": True}
        whole = quantize(target, source="(model input)", model=["model", 0], **read)
        graph["quantize"] = whole["1"]
    return graph


def download(file: str = DOWNLOADED, **inputs: Any) -> Graph:
    inputs = {"published": "(repo and file below)", "repo": "owner/name", **inputs}
    return {"1": node("SVDQuantDownloadModel", file=file, **inputs)}


# every input by which a file is named, as the graph of a name; with `.safetensors` where no name is one without it
NAME_INPUTS: dict[str, Callable[[str], Graph]] = {
    "load model_name": lambda name: {
        "1": node("SVDQuantLoadModel", model_name=name, compute="auto"),
        "2": node("SVDQuantModelInfo", model=["1", 0]),
    },
    "lora lora_name": lambda name: {
        "1": node("SVDQuantLoadModel", model_name="int4_native.safetensors", compute="auto"),
        "2": node("SVDQuantLoadLora", model=["1", 0], lora_name=name, strength_model=1.0),
        "3": node("SVDQuantModelInfo", model=["2", 0]),
    },
    "checkpoint ckpt_name": lambda name: {
        "1": node("SVDQuantLoadCheckpoint", ckpt_name=name, compute="auto"),
        "2": node("SVDQuantModelInfo", model=["1", 0]),
    },
    "demo model_name": lambda name: paint_16bit(name),
    "quantize file_name": lambda name: quantize(name),
    "quantize source": lambda name: quantize("never", source=name),
    "quantize statistics_file": lambda name: quantize("never", statistics_file=name),
    "convert file_name": lambda name: convert(name),
    "convert model_name": lambda name: convert("never", model_name=name),
    "bake file_name": lambda name: bake(name),
    "bake statistics_file": lambda name: bake("never", refit=True, statistics_file=name),
    "calibrate file_name": lambda name: calibrate(name),
    "download file": lambda name: download(f"{name}.safetensors"),
}


def paint_16bit(name: str, seed: int = 0) -> Graph:
    return {"model": node("SVDQuantDemoModel", model_name=name), **_sampling(seed, 2)}


# -- files


def make_files(folder: Path) -> dict[str, list[Path]]:
    """What the server starts with, by folder below models/; damaged files are called damaged_*."""
    models = [folder / DEMO]
    shutil.copy(ROOT / "workflows" / "models" / "diffusion_models" / DEMO, folder)
    for format, dialect in DIALECTS:
        models.append(folder / f"{format}_{dialect}.safetensors")
        if dialect == "native":
            quantize_model(FileSource(models[0]), models[-1], Recipe(format=format, rank=16, alternations=1))
        else:
            convert_file(folder / f"{format}_native.safetensors", models[-1], dialect)
    models += _damaged(folder / SWAPPED_FOR[0])
    for name in (SWAPPED, MOVED):
        models.append(folder / name)
        shutil.copy(folder / SWAPPED_FOR[0], models[-1])
    loras = [ROOT / "workflows" / "models" / "loras" / name for name in LORAS]
    return {"diffusion_models": models, "loras": [*loras, _nan_lora(loras[0], folder / NAN_LORA)]}


def _damaged(whole: Path) -> list[Path]:
    """Copies of a model, each with one damage that a file gets in real life or from a stranger."""
    data, tensors = whole.read_bytes(), load_file(whole)
    with safe_open(whole, "pt") as file:
        metadata = file.metadata()
    made = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "header": b"\xff" * 8 + data[8:],
        "deep": (100_008).to_bytes(8, "little") + b"[" * 100_000 + data,
        "zeros": bytes(len(data)),
    }
    for name, content in made.items():
        whole.with_name(f"damaged_{name}.safetensors").write_bytes(content)
    bias = next(name for name in tensors if name.endswith(".bias"))
    changed = {
        "nan": tensors | {bias: torch.full_like(tensors[bias], float("nan"))},
        "integers": tensors | {bias: tensors[bias].to(torch.int16)},
        "missing": {name: tensor for name, tensor in tensors.items() if not name.endswith(".smooth_factor")},
    }
    for name, other in changed.items():
        save_file(other, whole.with_name(f"damaged_{name}.safetensors"), metadata)
    return [whole.with_name(f"damaged_{name}.safetensors") for name in (*made, *changed)]


def _nan_lora(whole: Path, path: Path) -> Path:
    tensors = load_file(whole)
    first = next(name for name in tensors if tensors[name].ndim == 2)
    tensors[first][0, 0] = float("nan")
    save_file(tensors, path)
    return path


# -- faults


def models_of(host: Host) -> Path:
    return host.base / "models" / "diffusion_models"


def _replace(host: Host, name: str, by: str) -> None:
    """As a person's copy does: under another name, then in its place."""
    folder = models_of(host)
    aside = folder / f"{name}.{random.randrange(10**9)}.aside"
    shutil.copyfile(folder / by, aside)
    aside.replace(folder / name)


def _cut(host: Host, name: str) -> None:
    """In place, as a download that starts anew does."""
    with (models_of(host) / name).open("r+b") as stream:
        stream.truncate(100_000)


def _remove(host: Host, name: str) -> None:
    (models_of(host) / name).unlink(missing_ok=True)


def _vanish(host: Host) -> None:
    """Two clients that go away: one in the middle of its request, one that had asked for messages."""
    address = ("127.0.0.1", int(host.url.rpartition(":")[2]))
    head = "POST /prompt HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n{"
    hello = (
        "GET /ws?clientId=gone HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    for text in (head, hello):
        with socket.create_connection(address, 10) as client:
            client.sendall(text.encode())
            if text is hello:
                client.recv(64)


def _break_hub(host: Host) -> None:
    _remove(host, DOWNLOADED)
    Hub.break_after = [500_000]


def _lose_hub(host: Host) -> None:
    _remove(host, DOWNLOADED)
    Hub.lost_from = 0


def _mend_hub(host: Host) -> None:
    Hub.lost_from = None


# -- drawing


@dataclass
class Dealer:
    """Draws jobs: a shuffled deck of every kind, again and again, so that few prompts see most kinds too."""

    random: random.Random
    combinations: list[Combination] = field(init=False)

    def __post_init__(self) -> None:
        strengths = [round(self.random.uniform(-1, 1.5), 2) for _ in range(3)]
        drawn = set()
        while len(drawn) < 24:
            format, dialect = self.random.choice(DIALECTS)
            loras = self.random.sample(LORAS, self.random.choice((0, 1, 2, 2)))
            mixed = tuple((name, self.random.choice(strengths)) for name in loras)
            compute = self.random.choice(COMPUTES[format])
            drawn.add(Combination(f"{format}_{dialect}.safetensors", mixed, compute, self.random.randrange(2)))
        self.combinations = sorted(drawn, key=repr)

    def deal(self, count: int) -> list[Job]:
        jobs: list[Job] = []
        while len(jobs) < count:
            deck = [make for make, cards in self._kinds() for _ in range(cards)]
            self.random.shuffle(deck)
            jobs += [make() for make in deck]
        return jobs[:count]

    def _kinds(self) -> Iterator[tuple[Callable[[], Job], int]]:
        yield self._paint, 12
        for make in (self._write, self._odd_name, self._damaged_model):
            yield make, 3
        for make in (self._swapped, self._calibrate, self._download, self._interrupted):
            yield make, 2
        for make in (self._nan, self._moved, self._written, self._full_disk, self._vanished, self._info):
            yield make, 1

    def _paint(self) -> Job:
        combination = self.random.choice(self.combinations)
        fault = Host.free_memory if self.random.random() < 0.2 else None
        return Job("paint", paint(combination), (combination,), fault=fault)

    def _info(self) -> Job:
        graph = paint(self.random.choice(self.combinations))
        model = graph["sampler"]["inputs"]["model"]
        return Job(
            "info",
            {name: graph[name] for name in graph if name == "model" or name.startswith("lora")}
            | {"info": node("SVDQuantModelInfo", model=model), "loras": node("SVDQuantLoraInfo", model=model)},
        )

    def _target(self) -> dict[str, Any]:
        return {"file_name": self.random.choice(TARGETS), "overwrite": self.random.random() < 0.7}

    def _write(self) -> Job:
        """A file of a name that other clients write, with a file of that name removed now and then."""
        inputs, make = self._target(), self.random.choice((quantize, convert, bake))
        if make is quantize:
            inputs["format"] = self.random.choice(("int4", "nvfp4"))
        if make is convert:
            inputs["to"] = self.random.choice(("native", "nunchaku", "kitchen"))
        fault = None
        if self.random.random() < 0.3:
            gone = self.random.choice(TARGETS)
            fault = lambda host: _remove(host, gone)  # noqa: E731
        return Job(make.__name__, make(**inputs), said=TAKEN, target=inputs["file_name"], fault=fault)

    def _written(self) -> Job:
        """Whatever lies there at the moment: what it shows is not known, but it is a whole model."""
        combination = Combination(self.random.choice(TARGETS), (), "auto", 0)
        return Job("paint a target", paint(combination), said=NOT_THERE)

    def _calibrate(self) -> Job:
        target = self.random.choice((*TARGETS, "", "", ""))
        start_over = self.random.random() < 0.3
        graph = calibrate(self.random.choice(STATISTICS), self.random.randrange(9), target, start_over=start_over)
        return Job("calibrate", graph, said=TAKEN, target=target)

    def _download(self) -> Job:
        fault = self.random.choice((_break_hub, _lose_hub, _mend_hub, _mend_hub))
        said = ("stopped at .* Run it again to continue", "Turn overwrite on")
        return Job(
            "download", download(overwrite=self.random.random() < 0.5), said=said, target=DOWNLOADED, fault=fault
        )

    def _odd_name(self) -> Job:
        where, name = self.random.choice(sorted(NAME_INPUTS)), self.random.choice(sorted(BAD))
        return Job("odd name", NAME_INPUTS[where](name), said=(".",), must_fail=True)

    def _damaged_model(self) -> Job:
        name = self.random.choice(("cut", "empty", "header", "deep", "zeros", "nan", "integers", "missing"))
        combination = Combination(f"damaged_{name}.safetensors", (), "auto", 0)
        return Job("damaged model", paint(combination), said=(rf"damaged_{name}\.safetensors",), must_fail=True)

    def _nan(self) -> Job:
        combination = Combination("int4_native.safetensors", ((NAN_LORA, 1.0),), "auto", 0)
        return Job("NaN LoRA", paint(combination), said=("NaN|not finite|not all finite",), must_fail=True)

    def _swapped(self) -> Job:
        """A model that is replaced, cut short or made whole again while it is loaded."""
        by = self.random.choice(SWAPPED_FOR)
        fault: Callable[[Host], object] = lambda host: _replace(host, SWAPPED, by)  # noqa: E731
        if self.random.random() < 0.3:
            fault = _cut_swapped
        shown = Combination(SWAPPED, (), "auto", 0)
        pictures = tuple(Combination(name, (), "auto", 0) for name in SWAPPED_FOR)
        return Job("replaced model", paint(shown), pictures, said=(rf"{SWAPPED}.*(truncated|changed)",), fault=fault)

    def _moved(self) -> Job:
        whole = Combination(SWAPPED_FOR[0], (), "auto", 1)
        fault: Callable[[Host], object] = lambda host: _remove(host, MOVED)  # noqa: E731
        if self.random.random() < 0.5:
            fault = lambda host: _replace(host, MOVED, SWAPPED_FOR[0])  # noqa: E731
        return Job("removed model", paint(Combination(MOVED, (), "auto", 1)), (whole,), said=NOT_THERE, fault=fault)

    def _full_disk(self) -> Job:
        make = self.random.choice((quantize, convert, bake))
        name = f"{SMALL}/{self.random.randrange(100)}.safetensors"
        said = ("room|full|space|disk",)
        return Job("full disk", make(file_name=name), said=said, must_fail=True, target=name)

    def _vanished(self) -> Job:
        combination = self.random.choice(self.combinations)
        return Job("client gone", paint(combination), (combination,), fault=_vanish)

    def _interrupted(self) -> Job:
        """Stopped at any moment of it; what it had made is whole, or is not there."""
        after = self.random.uniform(0, 1.5)
        seed = self.random.randrange(9)
        target = self.random.choice(TARGETS)
        graph, target = self.random.choice(
            (
                (paint(self.random.choice(self.combinations), steps=30), ""),
                (calibrate(STATISTICS[0], seed, target), target),
                (quantize(target, overwrite=True, rank=32), target),
                (convert(target, overwrite=True), target),
                (bake(target, overwrite=True), target),
                (download(overwrite=True), DOWNLOADED),
            )
        )
        said = ("Interrupted", *TAKEN, "stopped at .* Run it again to continue")
        return Job("interrupted", graph, said=said, target=target, interrupt=after)


def _cut_swapped(host: Host) -> None:
    with contextlib.suppress(FileNotFoundError):
        _cut(host, SWAPPED)


def pasted(graph: Graph) -> str:
    """A graph as one line, for the report of what went wrong."""
    return json.dumps(graph, sort_keys=True)
