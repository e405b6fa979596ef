"""report.json, report.md and pictures of a quantization run."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files.lifecycle import write_whole
from .model import QuantizeReport

WORST = 10
DATA, TEXT = "report.json", "report.md"
PICTURES = ("error_by_layer.png", "error_by_step.png", "parts.png")


def summarize(report: QuantizeReport) -> dict[str, Any]:
    """Everything about a run as plain data; the numbers of `report.json`."""
    data = asdict(report)
    data["path"] = report.path.name
    measured = [record["output_error"] for record in report.layers.values() if "output_error" in record]
    data["mean_weight_error"] = _mean(report.errors.values())
    data["mean_output_error"] = _mean(measured)
    data["measured_layers"] = len(measured)
    data["worst"] = [layer for layer, _ in _by_error(report.layers)[:WORST]]
    data["ratio"] = report.bytes_16bit / report.bytes_4bit if report.bytes_4bit else None
    return data


def _mean(values: Any) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _by_error(layers: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Worst first, by output error where it was measured, else by weight error."""

    def error(item: tuple[str, Mapping[str, Any]]) -> float:
        return -item[1].get("output_error", item[1]["weight_error"])

    return sorted(layers.items(), key=error)


def write_report(report: QuantizeReport, folder: str | Path) -> list[Path]:
    """Write report.json, report.md and, where matplotlib is installed, the pictures. Returns what was written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = summarize(report)
    written = [write_whole(folder / DATA, f"{json.dumps(data, indent=2)}\n".encode())]
    pictures, missing = [], ""
    try:
        pictures = draw(report, folder)
    except ImportError:
        missing = "No pictures: matplotlib is not installed (`pip install matplotlib`)."
    written.append(write_whole(folder / TEXT, as_markdown(data, pictures, missing).encode()))
    return [*written, *pictures]


def as_markdown(data: Mapping[str, Any], pictures: list[Path], missing: str = "") -> str:
    """The report for people."""
    recipe = data["recipe"]
    lines = [
        f"# {data['path']}",
        "",
        f"{len(data['errors'])} layers of family {data['family']} are 4-bit: recipe {recipe.get('name')}, "
        f"{recipe.get('format')}, {data['seconds']:.1f} s, {data['peak_memory'] / 1e6:.0f} MB above the start at most.",
        "",
        f"- size of these layers: {data['bytes_4bit']:,} bytes, in 16 bit {data['bytes_16bit']:,}"
        + (f" ({data['ratio']:.2f}x)" if data["ratio"] else ""),
        f"- mean weight error: {_number(data['mean_weight_error'])}",
        f"- mean output error on held-out activations: {_number(data['mean_output_error'])} "
        f"({data['measured_layers']} layers measured)",
    ]
    if data["resumed"]:
        lines.append(f"- {data['resumed']} layers were taken over from an earlier, stopped run")
    lines += [f"- {note}" for note in data["notes"]]
    lines += [f"- {layer} has 8-bit activations: {reason}" for layer, reason in data["eight"].items()]
    lines += [f"- {layer} stays in 16 bit: {reason}" for layer, reason in data["kept"].items()]
    lines += ["", *_table(data)]
    remarks = [f"- {layer}: {note}" for layer, record in data["layers"].items() for note in record.get("notes", ())]
    if remarks:
        lines += ["", "## Remarks", "", *remarks]
    lines += ["", *(f"![{picture.stem}]({picture.name})" for picture in pictures)]
    return "\n".join([*lines, missing]).rstrip() + "\n"


def _table(data: Mapping[str, Any]) -> list[str]:
    """The worst layers, with the step bucket in which each is worst."""
    lines = [
        f"## The {len(data['worst'])} worst layers",
        "",
        "| layer | shape | rank | act bits | output error | activation part | weight part | worst steps | plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for layer in data["worst"]:
        record = data["layers"][layer]
        buckets = [(error, bucket) for bucket, error in enumerate(record.get("by_bucket", ())) if error is not None]
        worst = f"{max(buckets)[1] + 1}: {max(buckets)[0]:.4f}" if buckets else "-"
        figures = (_number(record.get(key)) for key in ("output_error", "activation_part", "weight_part"))
        shape = "x".join(map(str, record["shape"]))
        cells = [
            layer,
            shape,
            str(record["rank"]),
            str(record["act_bits"]),
            *figures,
            worst,
            _number(record.get("plain_error")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def draw(report: QuantizeReport, folder: Path) -> list[Path]:
    """Error per layer, per layer and step bucket, and activation part against weight part. Needs matplotlib.

    raises  ImportError without it
    """
    from matplotlib.figure import Figure

    layers = [(layer, record) for layer, record in report.layers.items() if record.get("output_error") is not None]
    if not layers:
        return []
    names = [layer for layer, _ in layers]
    height = 1.5 + 0.16 * len(layers)
    paths = [folder / name for name in PICTURES]

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [record["output_error"] for _, record in layers])
    axes.plot([record["plain_error"] for _, record in layers], names, "k.", label="plain SVDQuant")
    axes.set(xlabel="relative output error on held-out activations")
    axes.invert_yaxis()
    axes.legend()
    _save(figure, paths[0])

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    grid = [[float("nan") if error is None else error for error in record["by_bucket"]] for _, record in layers]
    image = axes.imshow(grid, aspect="auto")
    parts = range(len(grid[0]))
    axes.set(xlabel="part of the sampling run, first to last", xticks=parts, xticklabels=[part + 1 for part in parts])
    axes.set(yticks=range(len(names)), yticklabels=names)
    figure.colorbar(image, label="relative output error")
    _save(figure, paths[1])

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.loglog(
        [record["weight_part"] for _, record in layers], [record["activation_part"] for _, record in layers], "o"
    )
    axes.axline((0.01, 0.01), (0.1, 0.1), color="gray", linewidth=0.8)
    axes.set(xlabel="error of the weight", ylabel="error of rounding the activation")
    _save(figure, paths[2])
    return paths


def _save(figure: Any, path: Path) -> None:
    made = io.BytesIO()
    figure.savefig(made, dpi=110, format="png")
    write_whole(path, made.getvalue())
