"""The commands behind `python -m quantize`."""

import argparse
import sys
from pathlib import Path

from ..files.names import refuse_file
from ..maker.report import DATA, PICTURES, TEXT

_line = {"open": False}  # whether the line on standard error waits for its end; there is one in a process


def show(done: int, total: int, what: str) -> None:
    """Progress on standard error, in one line."""
    sys.stderr.write(f"\r{done}/{total} {what:<60.60}" + ("\n" if done == total else ""))
    _line["open"] = done != total


def complain(text: str) -> None:
    """One line on standard error, whatever progress has left there; names in it may hold ends of lines, and worse."""
    line = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    sys.stderr.write(("\n" if _line["open"] else "") + line + "\n")
    _line["open"] = False


def add_target(command: argparse.ArgumentParser) -> None:
    """Add OUT and --overwrite to a command that writes a file."""
    command.add_argument("target", metavar="OUT")
    command.add_argument("--overwrite", action="store_true", help="replace what is there already")


def _named(name: str) -> Path:
    """The path, whose last part has to be a name on every system. Raises ValueError."""
    path = Path(name)
    last = path.name if path.name not in ("", "..") else path.resolve().name
    if reason := refuse_file(last):
        raise ValueError(f"{name!r:.300} is no name for a new file: {reason}")
    return path


def report_folder_of(arguments: argparse.Namespace) -> Path | None:
    """--report of a command, None without. Raises ValueError if what would be written there may not be replaced."""
    if not arguments.report:
        return None
    folder = _named(arguments.report)
    if folder.is_file():
        raise ValueError(f"{folder}: is a file, needed a folder for the report")
    there = [name for name in (DATA, TEXT, *PICTURES) if (folder / name).exists()]
    if there and not arguments.overwrite:
        raise ValueError(f"{folder / there[0]}: is there already; choose another folder, or --overwrite to replace it")
    return folder


def target_of(arguments: argparse.Namespace, *sources: str) -> Path:
    """OUT of a command that reads `sources`. Raises ValueError if it is one of them, or may not be replaced."""
    path = _named(arguments.target)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, needed the name of a file to write")
    if any(Path(source).exists() and path.exists() and path.samefile(source) for source in sources):
        raise ValueError(f"{path}: is what is read, needed the name of another file")
    if path.exists() and not arguments.overwrite:
        raise ValueError(f"{path}: is there already; choose another name, or --overwrite to replace it")
    return path
