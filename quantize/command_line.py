"""The commands behind `python -m quantize`. Results go to standard output, errors to standard error, exit code 1."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from .build import quantize_model
from .compare import compare_files
from .inspect import inspect_file
from .recipe import Recipe
from .source import FileSource


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        result, text = arguments.run(arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing was written\n")
        return 130
    sys.stdout.write((json.dumps(result, indent=2) if arguments.json else text) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quantize", description="Make, inspect and compare 4-bit diffusion models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="say what a 4-bit file holds")
    command.add_argument("file")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("quantize", help="make a 4-bit file of a 16-bit model")
    command.add_argument("source", metavar="IN")
    command.add_argument("target", metavar="OUT")
    command.add_argument("--format", choices=("int4", "nvfp4"), default="int4")
    command.add_argument("--rank", type=int, default=32, help="width of the low-rank branch, a multiple of 16")
    command.add_argument("--device", default="cpu", help="where to compute, e.g. cuda")
    command.set_defaults(run=_quantize)

    command = commands.add_parser("compare", help="relative weight error per layer, largest first")
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    command.set_defaults(run=_compare)

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="machine-readable result")
    return parser


def _inspect(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    found = inspect_file(arguments.file)
    formats = ", ".join(f"{count} x {name}" for name, count in found["formats"].items())
    ranks = ", ".join(found["ranks"]) or "none"
    lines = [
        f"{found['file']}: {found['family']}, {found['dialect']} checkpoint",
        f"layers  {formats}; rank {ranks}",
        f"size    {found['bytes']:,} bytes, 16 bit would be {found['bytes_16bit']:,} ({found['ratio']:.2f}x)",
        f"recipe  {json.dumps(found['recipe'])}",
    ]
    return found, "\n".join(lines)


def _quantize(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    recipe = Recipe(format=arguments.format, rank=arguments.rank)
    start = time.perf_counter()

    def progress(done: int, total: int, layer: str) -> None:
        if not arguments.json:
            sys.stderr.write(f"\r{done}/{total} {layer:<60.60}" + ("\n" if done == total else ""))

    report = quantize_model(FileSource(arguments.source), arguments.target, recipe, progress, arguments.device)
    seconds = time.perf_counter() - start
    mean = sum(report.errors.values()) / len(report.errors)
    result = {
        "file": str(report.path),
        "family": report.family,
        "layers": len(report.errors),
        "bytes_4bit": report.bytes_4bit,
        "bytes_16bit": report.bytes_16bit,
        "mean_error": mean,
        "errors": dict(report.errors),
        "seconds": seconds,
    }
    text = (
        f"{report.path}: {len(report.errors)} layers of family {report.family}, "
        f"{report.bytes_16bit / report.bytes_4bit:.2f}x smaller, mean weight error {mean:.4f}, {seconds:.1f} s"
    )
    return result, text


def _compare(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    errors = compare_files(arguments.a, arguments.b)
    text = "\n".join(f"{error:.6f}  {layer}" for layer, error in errors.items()) or "no linear layer differs"
    return {"errors": errors}, text
