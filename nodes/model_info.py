"""Node: SVDQuant Model Info."""

from collections import Counter
from typing import Any

from .host.describe import FASTER, describe_model
from .host.files import leftover_text


class SVDQuantModelInfo:
    DESCRIPTION = "Says what a 4-bit MODEL is: family, formats, ranks, size, and which kernels run it and why."
    CATEGORY = "SVDQuant"
    FUNCTION = "describe"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The report as text.",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL", {"tooltip": "A model from SVDQuant Load Model."})}}

    def describe(self, model: Any) -> dict[str, Any]:
        text = report(describe_model(model))
        if left := leftover_text():
            text += f"\nleftover  {left}"
        return {"ui": {"text": [text]}, "result": (text,)}


def report(model: dict[str, Any] | None) -> str:
    """The table of `describe_model` as text."""
    if model is None:
        return "This MODEL is not 4-bit: it was not loaded by SVDQuant Load Model."
    lines = [
        f"file      {model['file']} ({model['dialect']} checkpoint)",
        f"family    {model['family']}",
        "layers    " + ", ".join(f"{count} {name}" for name, count in model["formats"].items()),
        "rank      " + (", ".join(f"{rank} ({count} layers)" for rank, count in model["ranks"].items()) or "none"),
        f"size      {model['bytes']:,} bytes; 16 bit {model['bytes_16bit']:,} ({model['ratio']:.2f}x)",
        f"device    {model['device']}, {model['dtype'].removeprefix('torch.')}",
    ]
    layers = model["backends"].values()
    runs = Counter(f"{layer['backend']} {layer['compute']}" for layer in layers)
    lines.append("compute   " + ", ".join(sorted({layer["asked"] for layer in layers})))
    lines.append("backend   " + ", ".join(f"{name} ({count} layers)" for name, count in runs.items()))
    counts = Counter(layer["decided"] for layer in layers)
    lines += [f"decided   {text} ({count} layers)" for text, count in counts.items()]
    if model["measured_with"]:
        lines.append(f"measured  with {model['measured_with']}")
    if model["not_measured"]:
        lines.append(f"measured  is not used: {model['not_measured']}")
    reasons = {name: reason for layer in layers for name, reason in layer["passed_over"].items()}
    lines += [f"not used  {name}: {reason}" for name, reason in sorted(reasons.items())]
    compiled = model["first_use"]
    if compiled["kernels"]:
        more = ", others follow" if compiled["running"] else ""
        lines.append(f"compiled  {compiled['kernels']} kernels in {compiled['seconds']} s while weights loaded{more}")
    if model["faster"]:
        lines.append(f"faster    {FASTER.format(model['faster'])}")
    lines += [f"note      {note}" for note in model["notes"]]
    loras = [layer["lora_rank"] for layer in layers if layer["lora_rank"]]
    if loras:
        lines.append(f"lora      {len(loras)} layers, {max(loras)} columns at most")
    return "\n".join(lines)
