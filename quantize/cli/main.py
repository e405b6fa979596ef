"""The commands behind `python -m quantize`. Results go to standard output, errors to standard error.

The exit code is 1 after an error, and for a result that names something `damaged`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..files.convert import TARGETS, convert_file
from ..files.describe import inspect_file
from ..measure.files import compare_files
from . import add_target, complain, target_of
from .clean import add_commands as add_cleaning
from .quantizer import add_commands, inspect_statistics, is_statistics
from .tune import add_commands as add_tuning
from .verify import add_commands as add_verifying

AddCommands = Callable[[Any], None]
"""Adds parsers, each with `run`, to argparse's subparsers"""


def main(argv: Sequence[str], more: Sequence[AddCommands] = ()) -> int:
    """Run one command; returns the exit code. `more` adds commands of the layers above."""
    arguments = _parser(more).parse_args(argv)
    try:
        result, text = arguments.run(arguments)
    except (ValueError, OSError) as error:
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        complain("stopped; nothing was written")
        return 130
    _say(json.dumps(result, indent=2) if arguments.json else text)
    return 1 if result.get("damaged") else 0


def _say(text: str) -> None:
    """Print it, whatever letters a file's name or header has that the terminal has not."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _parser(more: Sequence[AddCommands]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quantize", description="Make, inspect and compare 4-bit diffusion models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="say what a 4-bit or statistics file holds")
    command.add_argument("file")
    command.set_defaults(run=_inspect)

    add_commands(commands)

    command = commands.add_parser("compare", help="relative weight error per layer, largest first")
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    command.set_defaults(run=_compare)

    command = commands.add_parser("convert", help="write a 4-bit file in another dialect")
    command.add_argument("source", metavar="IN", help="a file, or a folder of files")
    add_target(command)
    command.add_argument("--to", choices=TARGETS, required=True)
    command.add_argument("--as-is", action="store_true", help="keep layer names, each layer on its own")
    command.set_defaults(run=_convert)

    for add in (add_verifying, add_tuning, add_cleaning, *more):
        add(commands)

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="machine-readable result")
    return parser


def _inspect(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if is_statistics(arguments.file):
        return inspect_statistics(arguments.file)
    found = inspect_file(arguments.file)
    formats = ", ".join(f"{count} x {name}" for name, count in found["formats"].items())
    ranks = ", ".join(found["ranks"]) or "none"
    lines = [
        f"{found['file']}: {found['family']}, {found['dialect']} checkpoint",
        f"layers  {formats}; rank {ranks}",
        f"size    {found['bytes']:,} bytes, 16 bit would be {found['bytes_16bit']:,} ({found['ratio']:.2f}x)",
        f"recipe  {json.dumps(found['recipe'])}",
        *(f"note    {note}" for note in found["notes"]),
    ]
    return found, "\n".join(lines)


def _compare(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    errors = compare_files(arguments.a, arguments.b)
    text = "\n".join(f"{error:.6f}  {layer}" for layer, error in errors.items()) or "no linear layer differs"
    return {"errors": errors}, text


def _convert(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    start = time.perf_counter()
    report = convert_file(arguments.source, target_of(arguments, arguments.source), arguments.to, arguments.as_is)
    seconds = time.perf_counter() - start
    result = {
        "file": str(report.path),
        "from": report.source_dialect,
        "to": report.dialect,
        "family": report.family,
        "layers": report.layers,
        "notes": list(report.notes),
        "seconds": seconds,
    }
    heading = f"{report.path}: {report.layers} layers, {report.source_dialect} -> {report.dialect}, {seconds:.1f} s"
    return result, "\n".join((heading, *report.notes))
