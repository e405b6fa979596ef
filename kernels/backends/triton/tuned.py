"""The file in which tuning keeps what it found on this machine, for all later processes.

    {"<GPU>, triton <version>": {kernel: [an entry as in tiles.json, ...]}}

What is in it counts only as far as tiles.py knows it.
"""

import json
import os
from pathlib import Path
from typing import Any

from ...bounded_json import read_object

NAME = "tiles.json"
Tables = dict[str, list[dict[str, Any]]]


def path() -> Path:
    """tiles.json in $XDG_CACHE_HOME/svdquant or ~/.cache/svdquant, on Windows in %LOCALAPPDATA%\\svdquant"""
    base = Path(os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "svdquant" / NAME


def read() -> dict[str, Tables]:
    """The whole file, {} if there is none.

    raises  OSError if it cannot be read, ValueError if it is not what tuning writes
    """
    try:
        text = path().read_bytes()
    except (FileNotFoundError, RuntimeError):  # RuntimeError: a user without a home folder
        return {}
    found = read_object(text, str(path()))
    if not _is_file(found):
        raise ValueError(f"{path()} does not hold tables of launch settings")
    return found


def _is_file(found: dict[str, Any]) -> bool:
    if not all(isinstance(tables, dict) for tables in found.values()):
        return False
    lists = [entries for tables in found.values() for entries in tables.values()]
    return all(isinstance(entries, list) and all(isinstance(each, dict) for each in entries) for entries in lists)


def with_tables(machine: str, tables: Tables) -> bytes:
    """The file as it is to be, with `tables` as what it says of this machine."""
    try:
        found = read()
    except ValueError:  # damaged: nothing in it is used
        found = {}
    return json.dumps(found | {machine: tables}, indent=1).encode()
