"""Bridge: what every LoRA of a 4-bit MODEL touches, how exactly, and at what cost; as plain data."""

from collections import Counter
from typing import Any

from ...quantize.lora.deltas import LoraError
from ...quantize.lora.loras import LayerLoras
from ...quantize.lora.patched_weight import Note
from .patcher import SVDQuantPatcher, layer_name


def describe_loras(patcher: Any) -> dict[str, Any] | None:
    """One row per LoRA in the order of the nodes, totals, injections of the host, and why something cannot be applied.

    None for a 16-bit MODEL.

    A row: name, file (in models/loras, where it is known), strength, hook, kinds {kind: layers}, layers (4-bit), other
    (keys of 16-bit layers, biases, norms), columns, kept (least share of energy in any layer), milliseconds (to make
    the factors), unknown keys.
    """
    if not isinstance(patcher, SVDQuantPatcher):
        return None
    notes: dict[str, list[Note]] = {}
    refused, loras = None, dict[str, LayerLoras]()
    try:
        loras = patcher.layer_loras(patcher.hooked_patches(), notes)
    except LoraError as error:
        refused = str(error)
    packed = patcher.packed_layers()
    rows = []
    for index, group in enumerate(patcher.groups(), 1):
        sources = {id(value) for value in group.values}
        mine = [(key, note) for key, entries in notes.items() for note in entries if id(note.source) in sources]
        kinds = Counter(note.kind for _, note in mine)
        rows.append(
            {
                "name": f"{'hook LoRA' if group.hook else 'LoRA'} {index}",
                "file": group.file,
                "strength": group.strength,
                "kinds": dict(kinds),
                "layers": sorted({layer_name(key) for key in group.keys if key in packed}),
                "applied": len({key for key, _ in mine}),
                "other": [key for key in group.keys if key not in packed],
                "columns": sum(note.columns for _, note in mine),
                "kept": min((note.kept for _, note in mine), default=1.0),
                "milliseconds": sum(note.milliseconds for _, note in mine),
                "unknown": list(group.unknown),
            }
        )
    return {
        "rows": rows,
        "beside": sorted(patcher.injections),
        "refused": refused,
        "layers": len(loras),
        "of": len(packed),
        "columns": sum(layer.rank for layer in loras.values()),
        "widest": max((layer.rank for layer in loras.values()), default=0),
        "bytes": 0 if refused else patcher.lora_bytes(),
    }
