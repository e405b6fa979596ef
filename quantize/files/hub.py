"""Published 4-bit files, and how to fetch one: resumable, checked, all or nothing.

The transfer is huggingface_hub's `http_backoff`, asked for one range after another: the library has the connections,
the user's token, proxies and certificates, and tries again. Its `hf_hub_download` cannot be stopped in every version,
throws a partial file away since 2.0, and removes the older file before it has the new one; what it and `HfFileSystem`
do with a second redirect is up to the version. What is added here: every hop of a redirect is looked at before anybody
is asked, so that the token goes to the hub alone and nothing comes over plain http but from a hub that is itself
configured so; a partial file outlives an interrupted run and is continued by the next one; and the sha256 that the hub
states is compared.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

from .lifecycle import partial_for
from .names import inside, refuse
from .spelling import formats_of

Progress = Callable[[int, int], None]
"""progress(bytes so far, bytes in all), called after every piece; raise from it to stop, the partial file stays"""

SHA256 = re.compile(r"[0-9a-f]{64}")
SUFFIXES = (".safetensors", ".json")  # nothing that a program could be made to run
ENDPOINT = "https://huggingface.co"
FIRST_PIECE, LARGEST_PIECE = 1 << 22, 1 << 26  # bytes of a request
PIECE_SECONDS = 1.0  # pieces grow until one takes as long: few requests, and a cancel is soon heard
TRIES = 3  # for one piece ...
PATIENCE = 10.0  # ... but once where it takes more seconds: then the library has tried again on its own
PAUSE = 0.5  # seconds before the second try, twice that before the third
HOPS = 8  # redirects of one request; the hub's own way is one or two
REDIRECTS = (301, 302, 303, 307, 308)
BUSY = (500, 502, 503, 504)  # answers after which the library tries again


class DownloadError(RuntimeError):
    """A file could not be fetched. The message names repository and file and says what to do."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, `owner/name`, at a branch, tag or commit."""

    repo: str
    file: str
    revision: str = "main"

    @property
    def title(self) -> str:
        return f"{self.repo}/{self.file}"

    @property
    def name(self) -> str:
        """What it is called on this machine."""
        return PurePosixPath(self.file).name


@dataclass(frozen=True)
class Downloaded:
    """A file that is there.

    fetched  False where it was there before
    checked  whether its sha256 is the one that the hub states; False where the hub states none
    nbytes   its size
    """

    path: Path
    fetched: bool
    checked: bool
    nbytes: int = field(default=0, compare=False)


@dataclass(frozen=True)
class PublishedFile:
    """A 4-bit checkpoint on the hub, by the names its publisher gave it. Sizes are asked of the hub."""

    repo: str
    file: str
    family: str
    precision: str

    @property
    def title(self) -> str:
        return f"{self.repo}/{self.file}"


def _nunchaku(model: str, family: str, variant: str = "", **ranks: tuple[int, ...]) -> list[PublishedFile]:
    """The files of one model, by the ranks of each precision, as file names call it; 32 where none is given."""
    name = f"{model}{variant}.safetensors"
    return [
        PublishedFile(f"nunchaku-tech/nunchaku-{model}", f"svdq-{tag}_r{rank}-{name}", family, fmt.name)
        for tag, fmt in formats_of("published").items()
        for rank in ranks.get(tag, (32,))
    ]


def _lightning(model: str, *variants: str) -> list[PublishedFile]:
    """Qwen-Image with a LoRA for few steps inside."""
    ranks = (32, 128)
    files = [_nunchaku(model, "qwen_image", f"-{each}", int4=ranks, fp4=ranks) for each in variants]
    return [file for several in files for file in several]


PUBLISHED: tuple[PublishedFile, ...] = (
    *_nunchaku("flux.1-dev", "flux"),
    *_nunchaku("flux.1-schnell", "flux"),
    *_nunchaku("flux.1-kontext-dev", "flux"),
    *_nunchaku("flux.1-fill-dev", "flux"),
    *_nunchaku("flux.1-depth-dev", "flux"),
    *_nunchaku("flux.1-canny-dev", "flux"),
    *_nunchaku("flux.1-krea-dev", "flux"),
    *_nunchaku("qwen-image", "qwen_image", int4=(32, 128), fp4=(32, 128)),
    *_nunchaku("qwen-image-edit", "qwen_image", int4=(32, 128), fp4=(32, 128)),
    *_nunchaku("qwen-image-edit-2509", "qwen_image", int4=(32, 128), fp4=(32, 128)),
    *_lightning("qwen-image", "lightningv1.0-4steps", "lightningv1.1-8steps"),
    *_lightning("qwen-image-edit", "lightningv1.0-4steps", "lightningv1.0-8steps"),
    *_lightning("qwen-image-edit-2509", "lightningv2.0-4steps", "lightningv2.0-8steps"),
    *_nunchaku("z-image-turbo", "z_image", int4=(32, 128, 256), fp4=(32, 128)),
    *_nunchaku("sdxl", "sdxl", fp4=()),
    *_nunchaku("sdxl-turbo", "sdxl", fp4=()),
)


def refuse_file(file: str) -> str | None:
    """Why a file of a repository is not fetched, by its name alone, or None."""
    if not file.endswith(SUFFIXES):
        return f"file is {file[:300]!r}, needed one that ends in {' or '.join(SUFFIXES)}"
    if {"", ".", ".."} & set(file.split("/")):
        return f"file is {file[:300]!r}, needed the path of a file inside the repository"
    reason = refuse(HubFile("", file).name)
    return None if reason is None else f"file is {file[:300]!r}, which is no name to write: {reason}"


def download(
    wanted: HubFile,
    folder: str | Path,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    endpoint: str | None = None,
) -> Downloaded:
    """Fetch one file of a hub repository into `folder` under its own base name.

    A file that is there already with the right size and sha256 is not fetched again; another one of that name is
    replaced only with `overwrite`, and not before the new one is whole. The endpoint is HF_ENDPOINT's unless given.

    raises  DownloadError when the file does not exist or is not of a kind that is fetched, another file is in its
            place, the connection is not safe or stays broken, the disk is full or the content is not what the hub
            says; whatever `progress` raises
    """
    if reason := refuse_file(wanted.file):
        raise DownloadError(f"{wanted.title}: {reason}")
    remote = _Remote.find(wanted, endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT)
    folder = Path(folder)
    target = inside(folder, wanted.name)
    if target.exists():
        if remote.is_content_of(target):
            return Downloaded(target, False, remote.sha256 is not None, remote.size)
        if target.is_dir() or (target.exists() and not overwrite):
            raise DownloadError(
                f"{wanted.title}: another {wanted.name} is in {folder.name} already. Turn overwrite on to replace it, "
                "or rename it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    partial = partial_for(target, remote.key)
    try:
        remote.fetch_into(partial, progress)
    except BaseException:
        if partial.exists() and not partial.stat().st_size:
            partial.unlink()
        raise
    if not remote.is_content_of(partial):
        partial.unlink()
        raise DownloadError(
            f"{wanted.title}: what arrived does not have the size and sha256 the hub states. Run it again."
        )
    partial.replace(target)
    return Downloaded(target, True, remote.sha256 is not None, remote.size)


class _Stopped(Exception):
    """Carries what `progress` raised past the handlers of network errors."""


@dataclass(frozen=True)
class _Remote:
    """A file as the hub describes it: pinned to a commit, so that no range is of another version."""

    wanted: HubFile
    endpoint: str
    commit: str
    size: int
    etag: str

    @classmethod
    def find(cls, wanted: HubFile, endpoint: str) -> "_Remote":
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        try:
            url = hf_hub_url(wanted.repo, wanted.file, revision=wanted.revision, endpoint=endpoint)
            found = get_hf_file_metadata(url)
        except Exception as error:  # the library's transport, and with it the errors, differ between its versions
            raise DownloadError(
                f"{wanted.title} at {wanted.revision!r}: {_first_line(error)}. Check the names and the network."
            ) from error
        if found.size is None or not found.etag:
            raise DownloadError(f"{wanted.title}: the hub states no size or no hash for it, so nothing can be checked")
        return cls(wanted, endpoint, found.commit_hash or wanted.revision, found.size, found.etag)

    @property
    def sha256(self) -> str | None:
        """What the hub states; small files have a hash of git's instead."""
        return self.etag if SHA256.fullmatch(self.etag) else None

    @property
    def key(self) -> str:
        return hashlib.sha256(self.etag.encode()).hexdigest()[:12]

    def is_content_of(self, path: Path) -> bool:
        """Whether a file is there, of the size that the hub states and the sha256 if it states one."""
        try:
            if not path.is_file() or path.stat().st_size != self.size:
                return False
            if self.sha256 is None:
                return True
            with path.open("rb") as stream:
                return _sha256(stream) == self.sha256
        except FileNotFoundError:
            return False

    def fetch_into(self, partial: Path, progress: Progress) -> None:
        """Append to a partial file what it lacks. Raises DownloadError, or what `progress` raises."""
        if partial.exists() and partial.stat().st_size > self.size:
            partial.unlink()
        try:
            with partial.open("ab") as stream:
                for piece in self._pieces(stream.tell()):
                    stream.write(piece)
                    stream.flush()
                    try:
                        progress(stream.tell(), self.size)
                    except BaseException as error:
                        raise _Stopped from error
        except _Stopped as stopped:
            assert stopped.__cause__ is not None
            raise stopped.__cause__ from None
        except DownloadError:
            raise
        except Exception as error:
            raise DownloadError(
                f"{self.wanted.title}: stopped at {partial.stat().st_size:,} of {self.size:,} bytes "
                f"({_first_line(error)}). Run it again to continue from there."
            ) from error

    def _pieces(self, start: int) -> Iterator[bytes]:
        """The bytes from `start` on. A piece that breaks is asked for again, smaller."""
        length, tries = FIRST_PIECE, 0
        while start < self.size:
            wanted, begun = min(length, self.size - start), time.monotonic()
            try:
                piece = self._get(start, start + wanted)
                if len(piece) != wanted:
                    raise OSError(f"asked for {wanted:,} bytes, {len(piece):,} came")
            except DownloadError:
                raise
            except Exception:
                tries, length = tries + 1, max(FIRST_PIECE, length // 4)
                if tries == TRIES or time.monotonic() - begun > PATIENCE:
                    raise
                time.sleep(PAUSE * tries)
                continue
            if time.monotonic() - begun < PIECE_SECONDS:
                length = min(2 * length, LARGEST_PIECE)
            tries, start = 0, start + wanted
            yield piece

    def _get(self, start: int, stop: int) -> bytes:
        """Bytes of the file, from wherever the hub sends us. Raises DownloadError for a place that is not safe."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, http_backoff

        url = hf_hub_url(self.wanted.repo, self.wanted.file, revision=self.commit, endpoint=self.endpoint)
        # requests and httpx, which versions of the library are built on, have a word each for it
        follow = "follow_redirects" if hasattr(get_session(), "follow_redirects") else "allow_redirects"
        for _ in range(HOPS):
            if not _is_safe(url, self.endpoint):
                there = urlsplit(url)
                raise DownloadError(
                    f"{self.wanted.title}: the hub sends us to {there.hostname} by plain {there.scheme}, needed https. "
                    "Is HF_ENDPOINT right?"
                )
            ours = _origin(url) == _origin(self.endpoint)
            asking: dict[str, Any] = {
                "headers": build_hf_headers(token=None if ours else False) | {"Range": f"bytes={start}-{stop - 1}"},
                "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
                follow: False,
            }
            if ours:
                answer = http_backoff("GET", url, retry_on_status_codes=BUSY, **asking)
            else:
                # once: http_backoff logs the address, which is signed, and a new try gets a new one from the hub
                answer = get_session().request("GET", url, **asking)
            if answer.status_code not in REDIRECTS or "location" not in answer.headers:
                hf_raise_for_status(answer)
                return answer.content
            url = urljoin(url, answer.headers["location"])
        raise DownloadError(f"{self.wanted.title}: the hub sends us from place to place, {HOPS} times and more")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _is_safe(location: str, endpoint: str) -> bool:
    """Whether content may come from there: by https, or by plain http from the host that was configured with it."""
    there, configured = urlsplit(location), urlsplit(endpoint)
    return there.scheme == "https" or (configured.scheme == there.scheme and configured.hostname == there.hostname)


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := stream.read(1 << 22):
        digest.update(piece)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    """What it says, without what stands behind the ? of an address: signatures do."""
    said = re.sub(r"\?[^\s'\")]+", "?...", str(error).strip())
    return said.splitlines()[0] if said else type(error).__name__
