"""Downloading from a hub that lies on the loopback device and breaks connections on request."""

import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from svdquant_pack.quantize import hub

CONTENT = bytes(range(256)) * 4096 * 12  # 12 MiB: several pieces of huggingface_hub's 10 MiB reads
DIGEST = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789" * 4


class Hub(http.server.BaseHTTPRequestHandler):
    """`/owner/name/resolve/main/model.safetensors` with the headers huggingface_hub reads."""

    protocol_version = "HTTP/1.1"
    content, etag = CONTENT, DIGEST
    break_after: list[int] = []  # noqa: RUF012 - one entry per GET that is to be cut after so many bytes
    ranges: list[str | None] = []  # noqa: RUF012 - the Range header of every GET

    def reply(self, body: bool) -> None:
        if not self.path.endswith("/resolve/main/model.safetensors"):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        for name, value in {
            "ETag": f'"{self.etag}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(self.content)),
            "X-Linked-Etag": f'"{self.etag}"',
            "Content-Length": str(len(self.content) - start),
            "Content-Range": f"bytes {start}-{len(self.content) - 1}/{len(self.content)}",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        Hub.ranges.append(asked)
        stop = start + Hub.break_after.pop(0) if Hub.break_after else len(self.content)
        self.wfile.write(self.content[start:stop])
        if stop < len(self.content):
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.reply(body=False)

    def do_GET(self) -> None:
        self.reply(body=True)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint():
    Hub.break_after, Hub.ranges, Hub.content, Hub.etag = [], [], CONTENT, DIGEST
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


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
