"""Quantize the demo model in a real ComfyUI, sample it in 16 and in 4 bit, with and without a LoRA, and compare.

    python tests/demo.py [--comfyui FOLDER] [--output FOLDER]        (or `make demo`, which sets everything up)

Writes comparison.png and results.json. The exit status is 0 only if every step ran and every figure is on the right
side of its floor. All images of a column come from the same seed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from host.server import Host, HostError, model_tree, run_seconds

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows" / "api"
MODELS = ROOT / "workflows" / "models"

# one row of the picture each, top to bottom: the workflow, and the compute mode that its model is loaded with
ROWS = {
    "16 bit": ("demo_16bit", ""),
    "INT4": ("demo_int4", "w4a4"),
    "INT4, auto": ("demo_int4", "auto"),
    "NVFP4": ("demo_nvfp4", "w4a4"),
    "INT4 + LoRA": ("demo_int4_lora", "w4a4"),
    "16 bit + LoRA": ("demo_16bit_lora", ""),
}
QUANTIZE = ("demo_quantize_int4", "demo_quantize_nvfp4")


@dataclass(frozen=True)
class Figure:
    """The mean PSNR of two rows, and the bound it must keep: at least `floor`, or at most `ceiling` (dB)."""

    key: str
    row: str
    against: str
    floor: float = -np.inf
    ceiling: float = np.inf


# floors lie just under what the reference kernels reach on a CPU: a wrong scale or a lost branch costs more than that
FIGURES = (
    Figure("int4_psnr", "INT4", "16 bit", floor=33),
    # what this device takes by itself, at least as close: every mode that `auto` prefers to w4a4 rounds less
    Figure("int4_auto_psnr", "INT4, auto", "16 bit", floor=33),
    Figure("nvfp4_psnr", "NVFP4", "16 bit", floor=36),
    Figure("lora_psnr", "INT4 + LoRA", "16 bit + LoRA", floor=30),
    # a LoRA that changed nothing would pass the line above
    Figure("lora_effect_psnr", "16 bit + LoRA", "16 bit", ceiling=20),
)


@dataclass(frozen=True)
class Sampled:
    """What one row gave: images (count, height, width) from 0 to 1, file bytes it loaded, seconds with loading."""

    images: np.ndarray
    bytes: int
    seconds: float


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """mean over images of 10 log10(1 / mean((image - reference)^2)), in dB; equal images count as 100 dB"""
    errors = np.square(images - reference).mean(axis=(1, 2))
    return float(np.mean(-10 * np.log10(np.maximum(errors, 1e-10))))


def read_workflow(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def sample(host: Host, name: str, compute: str) -> Sampled:
    """Run the workflow `name` in the mode `compute` and fetch its images."""
    workflow = read_workflow(name)
    for node in workflow.values():
        if "compute" in node["inputs"]:
            node["inputs"]["compute"] = compute
    entry = host.wait(host.queue(workflow))
    pngs = host.images(entry["outputs"])
    if not pngs:
        raise HostError(f"{name}.json ran and saved no image")
    for text in host.texts(entry["outputs"]):
        say("  " + text.strip().replace("\n", "\n  "))
    return Sampled(
        images=np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("L")) for png in pngs]) / 255,
        bytes=sum(file.stat().st_size for file in loaded_files(host, workflow)),
        seconds=run_seconds(entry),
    )


def loaded_files(host: Host, workflow: dict[str, Any]) -> set[Path]:
    """The model files that `workflow` names."""
    named = {value for node in workflow.values() for value in node["inputs"].values() if isinstance(value, str)}
    return {file for file in (host.base / "models").rglob("*.safetensors") if file.name in named}


def run(host: Host) -> tuple[dict[str, Sampled], dict[str, float]]:
    """Quantize to every format, then sample every row; returns the rows and the seconds of quantizing."""
    quantizing = {}
    for name in QUANTIZE:
        quantizing[name] = run_seconds(host.wait(host.queue(read_workflow(name))))
        say(f"{name}: {quantizing[name]:.1f} s")
    rows = {}
    for row, (name, compute) in ROWS.items():
        rows[row] = sample(host, name, compute)
        say(f"{row}: {len(rows[row].images)} images, {rows[row].seconds:.1f} s")
    return rows, quantizing


def summarize(rows: dict[str, Sampled], quantizing: dict[str, float], stats: dict[str, Any]) -> dict[str, Any]:
    """What results.json holds."""
    system = stats["system"]
    return {
        **{figure.key: round(psnr(rows[figure.row].images, rows[figure.against].images), 2) for figure in FIGURES},
        "bytes": {name: row.bytes for name, row in rows.items()},
        "seconds": {name: round(row.seconds, 2) for name, row in rows.items()},
        "quantize_seconds": {name: round(seconds, 2) for name, seconds in quantizing.items()},
        "python": system["python_version"].split()[0],
        "torch": system["pytorch_version"],
        "comfyui": system["comfyui_version"],
        "device": stats["devices"][0]["name"],
    }


def misses(results: dict[str, Any]) -> list[str]:
    """One line for every figure that is out of its bound."""
    return [
        f"{figure.key} is {results[figure.key]:.2f} dB ({figure.row} against {figure.against}), needed "
        + (f"at least {figure.floor:g}" if results[figure.key] < figure.floor else f"at most {figure.ceiling:g}")
        for figure in FIGURES
        # not within, rather than outside: NaN is a miss
        if not figure.floor <= results[figure.key] <= figure.ceiling
    ]


def row_figure(row: str, results: dict[str, Any]) -> str:
    """The PSNR of `row` as text; the 16-bit rows are what the others are measured against."""
    return next((f"{results[f.key]:.1f} dB" for f in FIGURES if f.row == row and np.isinf(f.ceiling)), "reference")


def table(results: dict[str, Any]) -> str:
    lines = [f"{'':15}{'PSNR':>10}{'files':>10}{'time':>10}"]
    for row in ROWS:
        size, seconds = f"{results['bytes'][row] / 1e6:.2f} MB", f"{results['seconds'][row]:.1f} s"
        lines.append(f"{row:15}{row_figure(row, results):>10}{size:>10}{seconds:>10}")
    device = "device {device}, ComfyUI {comfyui}, torch {torch}, Python {python}".format(**results)
    return "\n".join([*lines, f"the LoRA moves the 16-bit images to {results['lora_effect_psnr']:.1f} dB", device])


# sizes of the picture: drawn at twice the width at which a page shows it
ENLARGE = 5
GAP, GROUP_GAP, MARGIN, LABEL_WIDTH = 12, 36, 36, 290
COLUMNS = 10  # one of each digit
INK, SOFT_INK, LINE = "#1b1f24", "#67707b", "#c9ced6"


def draw(rows: dict[str, Sampled], results: dict[str, Any]) -> Image.Image:
    """The comparison picture: a labelled line of images per row, the LoRA rows set apart."""
    cell = rows["16 bit"].images.shape[-1] * ENLARGE
    width = MARGIN * 2 + LABEL_WIDTH + COLUMNS * (cell + GAP) - GAP
    height = MARGIN * 2 + len(rows) * (cell + GAP) - GAP + GROUP_GAP
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    name_font, figure_font = ImageFont.load_default(38), ImageFont.load_default(27)
    top, apart = MARGIN, False
    for name, row in rows.items():
        if "LoRA" in name and not apart:
            top, apart = top + GROUP_GAP, True
            rule = top - (GROUP_GAP + GAP) // 2
            pen.line([(MARGIN, rule), (width - MARGIN, rule)], LINE, 2)
        middle = top + cell // 2
        pen.text((MARGIN, middle - 22), name, INK, name_font, anchor="lm")
        figures = f"{row_figure(name, results)}, {row.bytes / 1e6:.1f} MB"
        pen.text((MARGIN, middle + 26), figures, SOFT_INK, figure_font, anchor="lm")
        for column, image in enumerate(row.images[:COLUMNS]):
            left = MARGIN + LABEL_WIDTH + column * (cell + GAP)
            digit = Image.fromarray(np.round(image * 255).astype(np.uint8))
            picture.paste(digit.resize((cell, cell), Image.Resampling.NEAREST).convert("RGB"), (left, top))
            pen.rectangle([left - 1, top - 1, left + cell, top + cell], outline=LINE, width=1)
        top += cell + GAP
    return picture


def say(text: str) -> None:
    print(text, flush=True)  # line by line also where standard output is a file


def demo(comfyui: Path, output: Path) -> int:
    """Everything, on one server; returns the exit status."""
    say("starting ComfyUI")
    with Host(comfyui, ROOT, models=model_tree(MODELS)) as host:
        try:
            rows, quantizing = run(host)
            results = summarize(rows, quantizing, host.system_stats())
        except (HostError, OSError):
            say(host.log_tail())
            raise
    missed = misses(results)
    output.mkdir(parents=True, exist_ok=True)
    draw(rows, results).save(output / "comparison.png", optimize=True)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    say(f"\n{table(results)}\n\nwritten: {output / 'comparison.png'}, {output / 'results.json'}")
    for line in missed:
        say(f"MISSED: {line}")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "ComfyUI"
    parser.add_argument("--comfyui", type=Path, default=default, help="ComfyUI source tree (default: COMFYUI_PATH)")
    parser.add_argument("--output", type=Path, default=ROOT / "demo", help="folder for the picture and the figures")
    options = parser.parse_args()
    try:
        return demo(options.comfyui, options.output)
    except (HostError, OSError) as error:
        say(f"demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("demo stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
