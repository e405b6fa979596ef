"""Published 4-bit files, and how to fetch one: resumable, checked, all or nothing.

The transfer is huggingface_hub's. What is added here: a partial file outlives an interrupted run and is continued by
the next one, the sha256 that the hub states is compared, and the caller hears of every piece and may stop.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from .spelling import formats_of

Progress = Callable[[int, int], None]
"""progress(bytes so far, bytes in all), called after every piece; raise from it to stop, the partial file stays"""

SHA256 = re.compile(r"[0-9a-f]{64}")


class DownloadError(RuntimeError):
    """A file could not be fetched. The message names repository and file and says what to do."""


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


def _nunchaku(model: str, family: str, **ranks: tuple[int, ...]) -> list[PublishedFile]:
    """The files of one model, by the ranks of each precision, as file names call it; 32 where none is given."""
    return [
        PublishedFile(f"nunchaku-tech/nunchaku-{model}", f"svdq-{tag}_r{rank}-{model}.safetensors", family, fmt.name)
        for tag, fmt in formats_of("published").items()
        for rank in ranks.get(tag, (32,))
    ]


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
    *_nunchaku("z-image-turbo", "z_image", int4=(32, 128, 256), fp4=(32, 128)),
    *_nunchaku("sdxl", "sdxl", fp4=()),
    *_nunchaku("sdxl-turbo", "sdxl", fp4=()),
)


class _Reporting:
    """A binary file that reports what is written to it. `stopped` is what `progress` raised."""

    def __init__(self, file: BinaryIO, total: int, progress: Progress) -> None:
        self._file, self._total, self._progress = file, total, progress
        self.stopped: BaseException | None = None

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        try:
            self._progress(self._file.tell(), self._total)
        except BaseException as error:
            self.stopped = error
            raise
        return written

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def download(
    repo: str,
    file: str,
    folder: str | Path,
    revision: str = "main",
    progress: Progress = lambda done, total: None,
    endpoint: str | None = None,
) -> Path:
    """Fetch one file of a hub repository into `folder` under its own base name; returns its path.

    A file that is there already with the right size and sha256 is not fetched again. The endpoint is HF_ENDPOINT's
    unless given.

    raises  DownloadError when the file does not exist, the connection stays broken, the disk is full or the content
            is not what the hub says; whatever `progress` raises
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    name = f"{repo}/{file}"
    try:
        url = hf_hub_url(repo, file, revision=revision, endpoint=endpoint or os.environ.get("HF_ENDPOINT"))
        found = get_hf_file_metadata(url)
    except Exception as error:  # the library's transport, and with it the errors, differ between its versions
        reason = f"{name} at {revision!r}: {_first_line(error)}. Check the names and the network."
        raise DownloadError(reason) from error
    target = Path(folder) / Path(file).name
    if target.is_file() and _is_whole(target, found.size, found.etag):
        return target
    partial = target.with_name(f"{target.name}.{(found.etag or 'x')[:12]}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    reporting = None
    try:
        with partial.open("ab") as stream:
            reporting = _Reporting(stream, found.size or 0, progress)
            http_get(
                found.location or url,
                cast(BinaryIO, reporting),
                resume_size=stream.tell(),
                headers=build_hf_headers(),
                expected_size=found.size,
            )
    except Exception as error:
        if reporting is not None and reporting.stopped is error:
            raise
        raise DownloadError(
            f"{name}: stopped at {partial.stat().st_size:,} of {found.size or 0:,} bytes ({_first_line(error)}). "
            "Run it again to continue from there."
        ) from error
    if not _is_whole(partial, found.size, found.etag):
        partial.unlink()
        raise DownloadError(f"{name}: what arrived does not have the size and sha256 the hub states. Run it again.")
    partial.replace(target)
    return target


def _is_whole(path: Path, size: int | None, etag: str | None) -> bool:
    if size is not None and path.stat().st_size != size:
        return False
    if not etag or not SHA256.fullmatch(etag):  # small files have a git hash here
        return size is not None
    with path.open("rb") as stream:
        return _sha256(stream) == etag


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := stream.read(1 << 22):
        digest.update(piece)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
