"""Which files a user may choose: models in models/diffusion_models, folders of the older layout, statistics."""

from collections.abc import Callable
from pathlib import Path

import folder_paths

from ...quantize.calibration.file import Statistics
from ...quantize.files.lifecycle import leftovers
from ...quantize.files.names import FileNameError, inside
from ...quantize.files.tensor_file import LEGACY_FOLDER

FOLDER = "diffusion_models"
CHECKPOINTS = "checkpoints"  # of whole ones
SUFFIX = ".statistics.safetensors"
MODEL_SUFFIX = ".safetensors"
NO_FILE = "(none)"
DIFFUSERS = "diffusers"  # the host's other folder
DIFFUSERS_MARKS = ("model_index.json", "diffusion_pytorch_model*.safetensors", "*.safetensors.index.json")


def choices(folder: str = FOLDER) -> list[str]:
    """Every file, and a folder of two tensor files as one entry in place of its parts."""
    names = folder_paths.get_filename_list(folder)
    parents = {str(Path(name).parent) for name in names if Path(name).name == LEGACY_FOLDER[0]}
    parts = {str(Path(parent) / file) for parent in parents for file in LEGACY_FOLDER}
    return sorted({str(Path(name)) for name in names} - parts | parents - {"."})


def source_choices() -> list[str]:
    """What can be quantized: every file, GGUF included, and folders of Diffusers models."""
    return sorted({*folder_paths.get_filename_list(FOLDER), *_unlisted()})


def _unlisted() -> dict[str, Path]:
    """{name: path} of what the host does not list: at most one folder down, its own list is not walked again."""
    roots = [
        root for kind in (FOLDER, DIFFUSERS) if kind in folder_paths.folder_names_and_paths for root in _roots(kind)
    ]
    found: dict[str, Path] = {}
    for root in roots:
        folders = [file.parent for mark in DIFFUSERS_MARKS for file in root.glob(f"*/{mark}")]
        for path in (*root.glob("*.gguf"), *root.glob("*/*.gguf"), *folders):
            found.setdefault(str(path.relative_to(root)), path)
    return found


def _roots(kind: str) -> list[Path]:
    return [Path(folder) for folder in folder_paths.get_folder_paths(kind)]


def find_source(name: str) -> Path | None:
    """The path of one of `source_choices`, or None if it is gone."""
    return find(name) or _unlisted().get(name)


def find_checkpoint(name: str) -> Path | None:
    """The path of a whole checkpoint, or None if it is gone."""
    return find(name, CHECKPOINTS)


def find(model_name: str, folder: str = FOLDER) -> Path | None:
    """The path of a choice, or None if it is gone."""
    path = folder_paths.get_full_path(folder, model_name)
    if path is not None:
        return Path(path)
    first = folder_paths.get_full_path(folder, str(Path(model_name) / LEGACY_FOLDER[0]))
    return None if first is None else Path(first).parent


def find_or_raise(model_name: str, search: Callable[[str], Path | None] = find, folder: str = FOLDER) -> Path:
    """The path of a choice. Raises FileNotFoundError that says where it should be."""
    path = search(model_name)
    if path is None:
        raise FileNotFoundError(f"{model_name} is not in models/{folder}; put it there and refresh the node list (R)")
    return path


def write_folder(kind: str = FOLDER) -> Path:
    """Where new models go: of ComfyUI's folders of that kind the one of that name."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(kind)]
    return next((folder for folder in folders if folder.name == kind), folders[0])


def target(file_name: str, overwrite: bool, kind: str = FOLDER) -> Path:
    """models/<kind>/<file_name>.safetensors. Raises ValueError if it exists and may not be replaced, or for a
    name that leaves the folder.
    """
    path = inside(write_folder(kind), file_name, MODEL_SUFFIX)
    if path.is_dir():
        raise ValueError(f"{path.name} in {path.parent} is a folder: choose another name")
    if path.exists() and not overwrite:
        raise ValueError(f"{path.name} exists already in {path.parent}: choose another name or turn overwrite on")
    return path


def keep_source(path: Path, source: Path | None) -> None:
    """Raise ValueError where writing `path` would replace the file that it is made from."""
    if source is not None and path.exists() and path.samefile(source):
        raise ValueError(
            f"{path.name} is the file that this would be made from: choose another name. Replaced by what is made of "
            "it, it could not be made again, and every further run would start from the last one's result"
        )


def refuse_name(file_name: str | None) -> str | None:
    """Why `file_name` is no name for a new model, or None if it is.

    None, which the host passes for a text that comes from another node, is checked when that text is there.
    """
    return None if file_name is None else _reason(write_folder(), file_name, MODEL_SUFFIX)


def leftover_text() -> str:
    """What stopped runs left in the folders that the pack writes to, in one line; empty where there is nothing."""
    places = dict.fromkeys((write_folder(), write_folder(CHECKPOINTS), statistics_folder()))
    folders = [folder for folder in places if folder.is_dir()]
    found = [each for folder in folders for each in leftovers(folder) if not each.in_use or each.elsewhere]
    if not found:
        return ""
    where = " and ".join(dict.fromkeys(str(each.path.parent) for each in found))
    size = sum(each.size for each in found)
    return f"{len(found)} unfinished files of stopped runs, {size:,} bytes, in {where}: `python -m quantize clean` them"


def _reason(folder: Path, file_name: str, suffix: str) -> str | None:
    try:
        inside(folder, file_name, suffix)
    except FileNameError as error:
        return str(error)
    return None


def statistics_folder() -> Path:
    """Where statistics are written and looked for."""
    return Path(folder_paths.get_output_directory()) / "svdquant"


def statistics_target(file_name: str) -> Path:
    """output/svdquant/<file_name>.statistics.safetensors. Raises ValueError for a name that leaves the folder."""
    return inside(statistics_folder(), file_name, SUFFIX)


def refuse_statistics_name(file_name: str | None) -> str | None:
    """As `refuse_name`, for new statistics."""
    return None if file_name is None else _reason(statistics_folder(), file_name, SUFFIX)


def statistics_files() -> list[str]:
    """Names of the statistics that a user may choose."""
    return sorted(path.name for path in statistics_folder().glob(f"*{SUFFIX}"))


def open_statistics(name: str) -> Statistics | None:
    """The file of that name among `statistics_files`; None for NO_FILE."""
    return None if name == NO_FILE else Statistics.open(statistics_folder() / Path(name).name)
