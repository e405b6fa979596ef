"""Node: SVDQuant Download Model."""

import re
from typing import Any

import comfy.model_management
import comfy.utils

from ..quantize.files.hub import PUBLISHED, HubFile, download, refuse_file
from .host.changed import WRITTEN, changed
from .host.files import FOLDER, write_folder

OTHER = "(repo and file below)"
REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class SVDQuantDownloadModel:
    DESCRIPTION = (
        "Fetches a published 4-bit checkpoint into models/diffusion_models. An interrupted download continues where "
        "it stopped; a file that is there already is only checked, another one of that name is replaced on request."
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
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace another file of this name."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, published: str | None = None, repo: str | None = None, file: str | None = None
    ) -> bool | str:
        # None: the text comes from another node, and is checked when it is there
        if published not in (None, OTHER, *(known.title for known in PUBLISHED)):
            return f"published is {published!r}, needed one of the list"
        if published != OTHER:
            return True
        if repo is not None and not REPO.fullmatch(repo.strip()):
            return f"repo is {repo!r}, needed owner/name"
        return (file is not None and refuse_file(file.strip())) or True

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        choice = inputs["published"], inputs.get("repo", ""), inputs.get("file", "")
        name = "" if None in choice else _wanted(*choice, "main").name  # None: what another node gives
        return changed([], write_folder() / name if name else None, inputs)

    def download(
        self, published: str, repo: str = "", file: str = "", revision: str = "main", overwrite: bool = False
    ) -> dict[str, Any]:
        wanted = _wanted(published, repo, file, revision.strip() or "main")
        if not (wanted.repo and wanted.file):
            raise ValueError(f"published is {OTHER}, needed a repo (owner/name) and a file")
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, max(done, total))

        with WRITTEN.writing(write_folder() / wanted.name):
            found = download(wanted, write_folder(), overwrite, progress)
        text = f"{wanted.name}: {found.nbytes:,} bytes in models/{FOLDER}"
        if not found.checked:
            text += "; the hub states no sha256, so only its size was compared"
        return {"ui": {"text": [text]}, "result": (wanted.name,)}


def _wanted(published: str, repo: str, file: str, revision: str) -> HubFile:
    """The file of a choice."""
    if published == OTHER:
        return HubFile(repo.strip(), file.strip(), revision)
    known = next(known for known in PUBLISHED if known.title == published)
    return HubFile(known.repo, known.file, revision)
