"""The command clean: what stopped runs left behind, listed with sizes, and removed."""

import argparse
from pathlib import Path
from typing import Any

from ..files.lifecycle import Leftover, clean, leftovers

KINDS = {"tmp": "unfinished file", "partial": "part of a download", "work": "finished layers"}


def add_commands(commands: Any) -> None:
    """Add the parser of this command to those of `python -m quantize`."""
    command = commands.add_parser("clean", help="remove what stopped runs and downloads left in a folder")
    command.add_argument("folder", metavar="FOLDER", help="with all folders in it, e.g. models/diffusion_models")
    command.add_argument("--dry-run", action="store_true", help="only list it")
    command.add_argument(
        "--other-machines",
        action="store_true",
        help="also what processes of other machines left; nobody can tell from here whether those still run",
    )
    command.set_defaults(run=_clean)


def _clean(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    sizes = {each.path: each.size for each in leftovers(folder)}
    found = clean(folder, arguments.dry_run, arguments.other_machines)
    done = {each.path for each in found}
    kept = [each for each in leftovers(folder) if each.path not in done]
    word = "would remove" if arguments.dry_run else "removed"
    lines = [f"{word}  {sizes[each.path]:>15,} bytes  {_what(each)}" for each in found]
    lines += [f"kept     {each.size:>15,} bytes  {_what(each)}: {_why(each)}" for each in kept]
    total = sum(sizes[each.path] for each in found)
    result = {
        "folder": str(folder),
        "dry_run": arguments.dry_run,
        "bytes": total,
        "removed": [_entry(each, sizes[each.path]) for each in found],
        "kept": [_entry(each, each.size) | {"why": _why(each)} for each in kept],
    }
    return result, "\n".join([*lines, f"{word} {len(found)} leftovers, {total:,} bytes, in {folder}"])


def _entry(found: Leftover, size: int) -> dict[str, Any]:
    return {"path": str(found.path), "kind": found.kind, "bytes": size}


def _what(found: Leftover) -> str:
    return f"{found.path} ({KINDS[found.kind]})"


def _why(found: Leftover) -> str:
    if found.owner is None or not found.in_use:
        return "it could not be removed"
    if found.elsewhere:
        return "of another machine, --other-machines removes it"
    return f"in use by process {found.owner.pid}"
