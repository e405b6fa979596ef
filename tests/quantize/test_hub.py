"""Downloading from a hub that lies on the loopback device and breaks connections on request."""

from importlib.metadata import version
from pathlib import Path

import pytest

from svdquant_pack.quantize.files import hub
from svdquant_pack.tests.quantize.loopback_hub import CONTENT, Hub, serving


@pytest.fixture
def endpoint():
    with serving() as address:
        yield address


def fetch(folder: Path, endpoint: str, **keywords) -> Path:
    return hub.download("owner/name", "model.safetensors", folder, endpoint=endpoint, **keywords)


def test_a_file_arrives_whole_with_progress(tmp_path, endpoint):
    seen = []
    path = fetch(tmp_path, endpoint, progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "model.safetensors" and path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_that_is_there_is_not_fetched_again(tmp_path, endpoint):
    fetch(tmp_path, endpoint)
    Hub.ranges.clear()
    fetch(tmp_path, endpoint)
    assert Hub.ranges == []
    (tmp_path / "model.safetensors").write_bytes(CONTENT[:-1] + b"?")
    assert fetch(tmp_path, endpoint).read_bytes() == CONTENT


@pytest.mark.xfail(
    int(version("huggingface_hub").split(".")[0]) < 1,
    reason="huggingface_hub before 1.0 does not continue a body that ends early; the next run does",
    strict=True,
)
def test_a_broken_connection_is_continued(tmp_path, endpoint):
    Hub.break_after = [11_000_000]
    assert fetch(tmp_path, endpoint).read_bytes() == CONTENT
    assert Hub.ranges[0] is None and Hub.ranges[1].startswith("bytes=")


def test_a_cancelled_download_is_continued_by_the_next_run(tmp_path, endpoint):
    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path, endpoint, progress=cancel)
    (partial,) = tmp_path.glob("*.partial")
    had = partial.stat().st_size
    assert 0 < had < len(CONTENT) and not (tmp_path / "model.safetensors").exists()
    Hub.ranges.clear()
    assert fetch(tmp_path, endpoint).read_bytes() == CONTENT
    assert Hub.ranges == [f"bytes={had}-"] and not list(tmp_path.glob("*.partial"))


def test_content_that_is_not_what_the_hub_states_is_thrown_away(tmp_path, endpoint):
    Hub.content = b"!" + CONTENT[1:]
    with pytest.raises(hub.DownloadError, match="sha256"):
        fetch(tmp_path, endpoint)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("repo", "file"), [("owner/name", "gone.safetensors"), ("not a repo", "model.safetensors")])
def test_a_wrong_name_is_said(tmp_path, endpoint, repo, file):
    with pytest.raises(hub.DownloadError, match=f"{repo}/{file}"):
        hub.download(repo, file, tmp_path, endpoint=endpoint)
    assert not list(tmp_path.iterdir())


def test_a_hub_that_is_not_there_is_said(tmp_path):
    with pytest.raises(hub.DownloadError, match="network"):
        fetch(tmp_path, "http://127.0.0.1:9")


def test_the_table_names_known_families():
    from svdquant_pack.quantize.families import FAMILIES

    assert len({file.title for file in hub.PUBLISHED}) == len(hub.PUBLISHED)
    assert {file.family for file in hub.PUBLISHED} <= FAMILIES.keys()
