"""Node: SVDQuant LoRA Info."""

from typing import Any

from .host.lora_report import describe_loras


class SVDQuantLoraInfo:
    DESCRIPTION = (
        "Says what each LoRA of a 4-bit MODEL does: kind, layers, columns of the low-rank branch, energy kept where it "
        "is approximated, time, and keys that found no place."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "describe"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The table as text.",)
    OUTPUT_NODE = True
    SEARCH_ALIASES = ("lora report", "lora keys")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL", {"tooltip": "A 4-bit model behind LoRA loaders."})}}

    def describe(self, model: Any) -> dict[str, Any]:
        text = report(describe_loras(model))
        return {"ui": {"text": [text]}, "result": (text,)}


def report(loras: dict[str, Any] | None) -> str:
    """The table of `describe_loras` as text."""
    if loras is None:
        return "This MODEL is not 4-bit: ComfyUI adds LoRAs to its weights."
    wrapped = ", ".join(loras["beside"])
    beside = [f"beside the layers: {wrapped} (ComfyUI adds it to what a layer gives)"] if wrapped else []
    if not loras["rows"]:
        return "\n".join(["This MODEL has no LoRA.", *beside])
    head = ("", "strength", "kind", "4-bit layers", "other keys", "columns", "kept", "ms")
    table = [head, *(_cells(row) for row in loras["rows"])]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.append(
        f"total: {loras['layers']} of {loras['of']} 4-bit layers, {loras['columns']} columns "
        f"({loras['widest']} in the widest layer), {loras['bytes']:,} bytes"
    )
    for row in loras["rows"]:
        if row["unknown"]:
            lines.append(f"{row['name']}: {len(row['unknown'])} keys found no place: {', '.join(row['unknown'][:10])}")
    lines += beside
    if loras["refused"]:
        lines.append(f"cannot be applied: {loras['refused']}")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items()) or "-"
    kept = f"{row['kept']:.4%}" if row["kept"] < 1 else "exact"
    numbers = str(len(row["layers"])), str(len(row["other"])), str(row["columns"])
    name = f"{row['name']}: {row['file']}" if row["file"] else row["name"]
    return name, f"{row['strength']:g}", kinds, *numbers, kept, f"{row['milliseconds']:.1f}"
