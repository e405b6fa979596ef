"""Downloading from a hub that lies on the loopback device, breaks connections and sends clients elsewhere."""

from pathlib import Path

import pytest

from svdquant_pack.quantize.files import hub
from svdquant_pack.quantize.files.hub import Downloaded, DownloadError, HubFile, download
from svdquant_pack.tests.quantize.loopback_hub import CONTENT, Hub, Store, redirecting, serving

PIECE = hub.FIRST_PIECE
NAME = "model.safetensors"


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(hub, "LARGEST_PIECE", PIECE)  # however fast this machine is
    with serving() as address:
        yield address


def fetch(folder: Path, endpoint: str, file: str = NAME, **keywords) -> Downloaded:
    return download(HubFile("owner/name", file), folder, endpoint=endpoint, **keywords)


def partials(folder: Path) -> list[Path]:
    return list(folder.glob(".*.partial"))


def test_a_file_arrives_whole_with_progress(tmp_path, endpoint):
    seen = []
    found = fetch(tmp_path, endpoint, progress=lambda done, total: seen.append((done, total)))
    assert found == Downloaded(tmp_path / NAME, fetched=True, checked=True) and found.path.read_bytes() == CONTENT
    assert seen == [(done, len(CONTENT)) for done in range(PIECE, len(CONTENT) + 1, PIECE)]
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_pieces_grow_where_the_network_is_fast(tmp_path, endpoint, monkeypatch):
    monkeypatch.setattr(hub, "LARGEST_PIECE", 1 << 26)
    monkeypatch.setattr(hub, "PIECE_SECONDS", 60.0)
    fetch(tmp_path, endpoint)
    assert Hub.ranges == [f"bytes=0-{PIECE - 1}", f"bytes={PIECE}-{len(CONTENT) - 1}"]


def test_a_file_that_is_there_is_not_fetched_again(tmp_path, endpoint):
    fetch(tmp_path, endpoint)
    Hub.ranges.clear()
    assert fetch(tmp_path, endpoint) == Downloaded(tmp_path / NAME, fetched=False, checked=True)
    assert Hub.ranges == []


@pytest.mark.parametrize("other", [b"my own model", CONTENT[:-1] + b"?"], ids=["another size", "the same size"])
def test_another_file_of_that_name_is_replaced_only_on_request(tmp_path, endpoint, other):
    (tmp_path / NAME).write_bytes(other)
    with pytest.raises(DownloadError, match=rf"owner/name/{NAME}: another {NAME} is in .* Turn overwrite on"):
        fetch(tmp_path, endpoint)
    assert Hub.ranges == [] and (tmp_path / NAME).read_bytes() == other
    assert fetch(tmp_path, endpoint, overwrite=True).fetched and (tmp_path / NAME).read_bytes() == CONTENT


def test_a_file_that_goes_while_it_is_looked_at_is_fetched(tmp_path, endpoint, monkeypatch):
    """Another client of the same server may remove it at any moment."""
    (tmp_path / NAME).write_bytes(b"gone in a moment")
    looked = hub._Remote.is_content_of

    def gone(remote, path):
        if path.name == NAME:
            path.unlink()
        return looked(remote, path)

    monkeypatch.setattr(hub._Remote, "is_content_of", gone)
    found = fetch(tmp_path, endpoint)
    assert found.fetched and found.nbytes == len(CONTENT) and found.path.read_bytes() == CONTENT


def test_the_older_file_stays_until_the_new_one_is_whole(tmp_path, endpoint):
    (tmp_path / NAME).write_bytes(b"my own model")

    def look(done: int, total: int) -> None:
        assert (tmp_path / NAME).read_bytes() == b"my own model"

    fetch(tmp_path, endpoint, overwrite=True, progress=look)
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_a_broken_connection_is_continued(tmp_path, endpoint):
    Hub.break_after = [PIECE, 1_000_000]
    assert fetch(tmp_path, endpoint).path.read_bytes() == CONTENT
    second = f"bytes={PIECE}-{2 * PIECE - 1}"
    assert Hub.ranges[:3] == [f"bytes=0-{PIECE - 1}", second, second]


def test_a_connection_that_stays_broken_is_continued_by_the_next_run(tmp_path, endpoint):
    Hub.lost_from = PIECE
    with pytest.raises(DownloadError, match=rf"stopped at {PIECE:,} of {len(CONTENT):,} bytes .* Run it again"):
        fetch(tmp_path, endpoint)
    Hub.lost_from, Hub.ranges = None, []
    assert fetch(tmp_path, endpoint).path.read_bytes() == CONTENT
    assert Hub.ranges[0] == f"bytes={PIECE}-{2 * PIECE - 1}"


def test_a_cancelled_download_is_continued_by_the_next_run(tmp_path, endpoint):
    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path, endpoint, progress=cancel)
    (partial,) = partials(tmp_path)
    had = partial.stat().st_size
    assert 0 < had < len(CONTENT) and not (tmp_path / NAME).exists()
    Hub.ranges.clear()
    assert fetch(tmp_path, endpoint).path.read_bytes() == CONTENT
    assert Hub.ranges[0].startswith(f"bytes={had}-") and not partials(tmp_path)


def test_content_that_is_not_what_the_hub_states_is_thrown_away(tmp_path, endpoint):
    Hub.content = b"!" + CONTENT[1:]
    with pytest.raises(DownloadError, match="sha256"):
        fetch(tmp_path, endpoint)
    assert not list(tmp_path.iterdir())


def test_a_hub_that_states_no_sha256_is_said(tmp_path, endpoint):
    Hub.etag = "ab" * 20  # as git names a small file
    assert fetch(tmp_path, endpoint, "config.json") == Downloaded(tmp_path / "config.json", True, checked=False)
    assert fetch(tmp_path, endpoint, "config.json") == Downloaded(tmp_path / "config.json", False, checked=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_token_goes_to_the_hub_alone(tmp_path, endpoint, monkeypatch, overwrite):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with redirecting():
        assert fetch(tmp_path, endpoint, overwrite=overwrite).path.read_bytes() == CONTENT
    assert len(Store.tokens) == len(CONTENT) // PIECE and set(Store.tokens) == {None}


def test_the_hub_itself_gets_the_token(tmp_path, endpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen, send = [], Hub.send_content

    def watch(request: Hub, body: bool) -> None:
        seen.append(request.headers.get("Authorization"))
        send(request, body)

    monkeypatch.setattr(Hub, "send_content", watch)
    fetch(tmp_path, endpoint)
    assert set(seen) == {"Bearer hf_secret"}


def test_no_hop_of_a_chain_sees_the_token(tmp_path, endpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with redirecting("127.0.0.1", "127.0.0.1", "127.0.0.1"):
        assert fetch(tmp_path, endpoint).path.read_bytes() == CONTENT
    assert len(set(Store.asked)) == 3 and set(Store.tokens) == {None}


@pytest.mark.parametrize("status", [403, 503])
def test_neither_the_token_nor_a_signed_address_is_shown(tmp_path, endpoint, monkeypatch, caplog, status):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    Hub.signed = "?Expires=1&Signature=geheim"
    with redirecting(), pytest.raises(DownloadError, match=f"stopped at 0 of .*{status}") as caught:
        Store.refuses = status
        fetch(tmp_path, endpoint)
    assert Store.asked and not any(word in f"{caught.value}{caplog.text}" for word in ("geheim", "hf_secret"))


@pytest.mark.parametrize("hosts", [["localhost"], ["127.0.0.1", "localhost"], ["127.0.0.1", "127.0.0.1", "localhost"]])
def test_plain_http_elsewhere_is_refused_at_any_hop_before_it_is_asked(tmp_path, endpoint, hosts):
    with redirecting(*hosts), pytest.raises(DownloadError, match="to localhost by plain http, needed https"):
        fetch(tmp_path, endpoint)
    assert len(Store.asked) == len(hosts) - 1 and not list(tmp_path.iterdir())


def test_a_ring_of_redirects_ends(tmp_path, endpoint):
    with redirecting("127.0.0.1", "127.0.0.1"):
        ((first, second),) = Store.onward.items()
        Store.onward[int(second.rpartition(":")[2])] = f"http://127.0.0.1:{first}"
        with pytest.raises(DownloadError, match="from place to place, 8 times and more"):
            fetch(tmp_path, endpoint)
    assert len(Store.asked) == hub.HOPS - 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("location", "endpoint", "safe"),
    [
        ("https://cdn.example/x", "https://huggingface.co", True),
        ("https://cdn.example/x", "http://mirror.lan", True),
        ("http://cdn.example/x", "https://huggingface.co", False),
        ("http://huggingface.co/x", "https://huggingface.co", False),
        ("http://mirror.lan:81/x", "http://mirror.lan", True),
        ("http://mirror.lan@cdn.example/x", "http://mirror.lan", False),
        ("ftp://mirror.lan/x", "http://mirror.lan", False),
        ("file:///etc/passwd", "https://huggingface.co", False),
    ],
)
def test_where_content_may_come_from(location, endpoint, safe):
    assert hub._is_safe(location, endpoint) is safe


@pytest.mark.parametrize(
    "file",
    [
        *(
            "run.py",
            "model.ckpt",
            ".bashrc",
            ".",
            "..",
            "",
            "a/..",
            "CON.json",
            "a:b.json",
            "a\\..\\b.json",
            "x\0.json",
        ),
        *("../x.json", "/x.json", "a/../../x.json", "a//x.json"),
    ],
)
def test_a_file_that_is_no_model_is_refused_before_anything_is_asked(tmp_path, file):
    with pytest.raises(DownloadError, match=r"needed one that ends in|inside the repository|which is no name to write"):
        fetch(tmp_path, "http://127.0.0.1:9", file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("repo", "file"), [("owner/name", "gone.safetensors"), ("not a repo", NAME)])
def test_a_wrong_name_is_said(tmp_path, endpoint, repo, file):
    with pytest.raises(DownloadError, match=f"{repo}/{file}"):
        download(HubFile(repo, file), tmp_path, endpoint=endpoint)
    assert not list(tmp_path.iterdir())


def test_a_hub_that_is_not_there_is_said(tmp_path):
    with pytest.raises(DownloadError, match="network"):
        fetch(tmp_path, "http://127.0.0.1:9")


def test_the_table_names_known_families():
    from svdquant_pack.quantize.families import FAMILIES

    assert len({file.title for file in hub.PUBLISHED}) == len(hub.PUBLISHED)
    assert {file.family for file in hub.PUBLISHED} <= FAMILIES.keys()
