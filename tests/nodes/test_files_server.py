"""Files on a real server: downloads that break, are cancelled and go on; folders of the older layout."""

import io
import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.files.convert import convert_file
from svdquant_pack.quantize.files.hub import FIRST_PIECE
from svdquant_pack.quantize.files.source import FileSource
from svdquant_pack.quantize.files.tensor_file import TensorFile
from svdquant_pack.quantize.maker.model import quantize_model
from svdquant_pack.quantize.recipe import Recipe
from svdquant_pack.tests.host.server import ExecutionFailed, Host, PromptRefused
from svdquant_pack.tests.quantize.loopback_hub import Hub, serving
from svdquant_pack.tests.quantize.stored_models import legacy_folder

ROOT = Path(__file__).resolve().parents[2]
FILE = "model.safetensors"
pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def nunchaku(demo_file, tmp_path_factory) -> Path:
    """A 4-bit file of the demo model, as Nunchaku spells it."""
    folder = tmp_path_factory.mktemp("files")
    quantize_model(FileSource(demo_file), folder / "native.safetensors", Recipe(rank=16, alternations=1))
    return convert_file(folder / "native.safetensors", folder / "nunchaku.safetensors", "nunchaku").path


@pytest.fixture(scope="module")
def host(nunchaku):
    """A server whose hub is ours. What that serves is a real model, with a long header: several pieces for a client."""
    metadata = TensorFile(nunchaku).metadata | {"padding": "x" * (32 << 20)}
    large = nunchaku.with_name(FILE)
    save_file(load_file(nunchaku), large, metadata)
    with serving(large.read_bytes()) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", address)
        with Host(os.environ["COMFYUI_PATH"], ROOT) as host:
            yield host


@pytest.fixture
def models(host) -> Path:
    """The server's folder of models, without what an earlier test has fetched."""
    folder = host.base / "models" / "diffusion_models"
    for file in [*folder.glob(f"{FILE}*"), *unfinished(folder)]:
        file.unlink()
    Hub.break_after, Hub.ranges, Hub.hold_at, Hub.lost_from = [], [], None, None
    return folder


def unfinished(folder: Path) -> list[Path]:
    return list(folder.glob(".*.partial"))


def download(**inputs: object) -> dict:
    inputs = {"published": "(repo and file below)", "repo": "owner/name", "file": FILE} | inputs
    return {"1": {"class_type": "SVDQuantDownloadModel", "inputs": inputs}}


def paint(model_name: str) -> dict:
    graph = json.loads((ROOT / "workflows" / "api" / "demo_int4.json").read_text())
    graph["1"]["inputs"]["model_name"] = model_name
    graph["4"]["inputs"]["batch_size"], graph["5"]["inputs"]["steps"] = 2, 2
    return graph


def pixels(host, outputs) -> list[bytes]:
    return [Image.open(io.BytesIO(image)).tobytes() for image in host.images(outputs)]


def offered(host) -> list[str]:
    return host.object_info("SVDQuantLoadModel")["input"]["required"]["model_name"][0]


def test_a_download_goes_on_after_a_broken_connection_and_the_model_runs(host, models):
    Hub.break_after = [FIRST_PIECE, 1_000_000]
    (text,) = host.texts(host.run(download()))
    assert text == f"{FILE}: {len(Hub.content):,} bytes in models/diffusion_models"
    assert Hub.ranges[0] == f"bytes=0-{FIRST_PIECE - 1}" and Hub.ranges[2].startswith(f"bytes={FIRST_PIECE}-")
    assert (models / FILE).read_bytes() == Hub.content and FILE in offered(host)
    assert len(host.images(host.run(paint(FILE)))) == 2


def test_a_connection_that_stays_broken_fails_and_the_next_run_goes_on(host, models):
    Hub.lost_from = FIRST_PIECE
    with pytest.raises(ExecutionFailed, match=rf"stopped at {FIRST_PIECE:,} of .* Run it again to continue"):
        host.run(download())
    assert FILE not in offered(host), "a part is never offered"
    Hub.lost_from, Hub.ranges = None, []
    host.run(download())
    assert Hub.ranges[0].startswith(f"bytes={FIRST_PIECE}-") and not unfinished(models)
    assert (models / FILE).read_bytes() == Hub.content


def test_a_cancelled_download_leaves_a_part_that_the_next_run_completes(host, models):
    Hub.hold_at = 15_000_000
    prompt, deadline = host.queue(download()), time.monotonic() + 60
    while not any(part.stat().st_size for part in unfinished(models)) and time.monotonic() < deadline:
        time.sleep(0.05)
    host.interrupt()
    Hub.go_on.set()
    with pytest.raises(ExecutionFailed, match="Interrupted"):
        host.wait(prompt)
    (part,) = unfinished(models)
    had = part.read_bytes()
    assert 0 < len(had) < len(Hub.content) and Hub.content.startswith(had) and not (models / FILE).exists()
    Hub.ranges.clear()
    host.run(download())
    assert Hub.ranges[0].startswith(f"bytes={len(had)}-") and (models / FILE).read_bytes() == Hub.content
    assert not unfinished(models)


def test_a_download_replaces_another_file_only_on_request(host, models):
    (models / FILE).write_bytes(b"my own model")
    with pytest.raises(ExecutionFailed, match="Turn overwrite on"):
        host.run(download())
    assert (models / FILE).read_bytes() == b"my own model"
    host.run(download(overwrite=True))
    assert (models / FILE).read_bytes() == Hub.content


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ({"file": "run.py"}, "needed one that ends in"),
        ({"file": ".."}, "needed one that ends in"),
        ({"file": "sub/CON.safetensors"}, "is a device on Windows"),
        ({"repo": "../../etc"}, "needed owner/name"),
        ({"repo": ""}, "needed owner/name"),
        ({"published": "nobody/nothing"}, "needed one of the list"),
    ],
)
def test_what_is_never_fetched_is_refused_when_it_is_queued(host, models, inputs, why):
    with pytest.raises(PromptRefused, match=why):
        host.queue(download(**inputs))
    assert not Hub.ranges


def test_a_file_that_was_removed_is_fetched_again(host, models):
    host.run(download())
    (models / FILE).unlink()
    host.run(download())
    assert (models / FILE).read_bytes() == Hub.content


def test_a_wrong_name_fails_and_says_so(host, models):
    with pytest.raises(ExecutionFailed, match=r"owner/name/gone\.safetensors at 'main'.*Check the names"):
        host.run(download(file="gone.safetensors"))


def test_a_folder_of_the_older_layout_is_one_model(host, nunchaku):
    folder = host.base / "models" / "diffusion_models"
    legacy_folder(folder / "svdq-int4-digits", nunchaku)
    (folder / "single.safetensors").symlink_to(nunchaku)
    names = [name for name in offered(host) if name.startswith("svdq-int4-digits")]
    assert names == ["svdq-int4-digits"], "the folder, not its files"
    outputs = host.run(paint("svdq-int4-digits"))
    assert any("svdq-int4-digits (nunchaku checkpoint)" in text for text in host.texts(outputs))
    assert pixels(host, outputs) == pixels(host, host.run(paint("single.safetensors")))
    (folder / "svdq-int4-digits" / "unquantized_layers.safetensors").unlink()
    with pytest.raises(PromptRefused, match="Choose one file"):
        host.run(paint("svdq-int4-digits"))
