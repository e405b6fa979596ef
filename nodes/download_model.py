"""Node: SVDQuant Download Model."""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils

from ..quantize.files.hub import PUBLISHED, download
from .host.changed import WRITTEN, changed
from .host.files import FOLDER, write_folder

OTHER = "(repo and file below)"


class SVDQuantDownloadModel:
    DESCRIPTION = (
        "Fetches a published 4-bit checkpoint into models/diffusion_models. An interrupted download continues where "
        "it stopped; a file that is there already is only checked."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "download"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("model_name",)
    OUTPUT_TOOLTIPS = ("The file's name, as SVDQuant Load Model lists it after a refresh (R).",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "published": (
                    [*(file.title for file in PUBLISHED), OTHER],
                    {"tooltip": "Known 4-bit files: int4 for RTX 20, 30 and 40, fp4 (nvfp4) for RTX 50."},
                ),
            },
            "optional": {
                "repo": ("STRING", {"default": "", "tooltip": "Another repository, as owner/name."}),
                "file": ("STRING", {"default": "", "tooltip": "The file in that repository."}),
                "revision": ("STRING", {"default": "main", "tooltip": "Branch, tag or commit."}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        names = inputs["published"], inputs.get("repo", ""), inputs.get("file", "")
        file = "" if None in names else _names(*names)[1]  # None: what another node gives
        return changed([], _target(file) if file else None, inputs)

    def download(self, published: str, repo: str = "", file: str = "", revision: str = "main") -> dict[str, Any]:
        repo, file = _names(published, repo, file)
        if not (repo and file):
            raise ValueError(f"published is {OTHER}, needed a repo (owner/name) and a file")
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, max(done, total))

        with WRITTEN.writing(_target(file)):
            path = download(repo, file, write_folder(), revision.strip() or "main", progress)
        text = f"{path.name}: {path.stat().st_size:,} bytes in models/{FOLDER}"
        return {"ui": {"text": [text]}, "result": (path.name,)}


def _target(file: str) -> Path:
    return write_folder() / Path(file).name


def _names(published: str, repo: str, file: str) -> tuple[str, str]:
    """(repository, file) of a choice."""
    if published == OTHER:
        return repo.strip(), file.strip()
    return next((known.repo, known.file) for known in PUBLISHED if known.title == published)
