"""Names of files that a user chooses: one rule for everything the pack writes, the same on every system.

A folder of models is moved between systems and shared over networks, so a name has to be right on all of them. `/` and
`\\` both part folders.
"""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from .lifecycle import LONGEST_PART

LONGEST_NAME = 1000  # bytes, folders included; systems allow a whole path some hundreds more
PORTS = [f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789¹²³"]
DEVICES = frozenset(["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *PORTS])
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*]')


class FileNameError(ValueError):
    """A text is no name for a file inside the folder. The message says why."""


def refuse(name: str, suffix: str = "") -> str | None:
    """Why `name`, with `suffix` behind it if it does not end in that, is no name inside a folder; or None."""
    if not name.strip():
        return "it is empty"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it holds half of a character (a lone surrogate)"
    if size > LONGEST_NAME:
        return f"it has {size} bytes, at most {LONGEST_NAME} are possible"
    windows = PureWindowsPath(name)
    if windows.drive or windows.root or PurePosixPath(name).is_absolute():
        return "it starts at a drive or at the root, not in the folder"
    # as it was typed, too: `..` does not become right by what is put behind it
    return next(filter(None, map(_refuse_part, [*parts(name), *parts(name, suffix)])), None)


def refuse_file(name: str) -> str | None:
    """Why `name` is no name of one file, or None; the folders above it are the user's own and have any name."""
    return "it holds '\\', which parts folders on Windows" if "\\" in name else refuse(name)


def parts(name: str, suffix: str = "") -> list[str]:
    """Folders and file of a name."""
    return (name if name.endswith(suffix) else name + suffix).replace("\\", "/").split("/")


def _refuse_part(part: str) -> str | None:
    if part in ("", ".", ".."):
        return f"{part!r} between separators leads elsewhere or nowhere"
    if found := FORBIDDEN.search(part):
        return f"it holds {found.group()!r}"
    if part != part.rstrip(" .") or part != part.lstrip(" "):
        return f"{part!r} starts with a space or ends with a space or a dot, which Windows drops"
    if part.partition(".")[0].rstrip(" ").upper() in DEVICES:
        return f"{part!r} is a device on Windows"
    if len(part.encode()) > LONGEST_PART:
        return f"a part of it has {len(part.encode())} bytes, at most {LONGEST_PART} are possible"
    return None


def inside(folder: Path, name: str, suffix: str = "") -> Path:
    """folder / name + suffix. Raises FileNameError for a name that is none, or leads out of the folder by a link."""
    reason = refuse(name, suffix)
    if reason is None:
        path = folder.joinpath(*parts(name, suffix))
        if _is_below(path.parent, folder):
            return path
        reason = "a link in it leads out of the folder"
    where = f"{folder.parent.name}/{folder.name}"
    raise FileNameError(f"file_name is {name[:300]!r}, needed a name inside {where}: {reason}")


def _is_below(path: Path, folder: Path) -> bool:
    """Where links really lead."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False
