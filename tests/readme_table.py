"""README's table of model families, made from the code. `python tests/readme_table.py --write` puts it in README.md.

It stands between the lines `<!-- families -->` and `<!-- /families -->`.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "workflows" / "models" / "diffusion_models"
START, END = "<!-- families -->", "<!-- /families -->"
# no layout for nvfp4 with a low-rank branch; for ComfyUI's own loader such layers become int4
HELD = {"kitchen": ("int4",), "core": ("int4",)}
SPELLED = {"int4": "INT4", "nvfp4": "NVFP4"}


def rows() -> list[list[str]]:
    """Header and one row per family: family, models, published files, one column per dialect, LoRA, workflow."""
    from svdquant_pack.quantize.families import FAMILIES
    from svdquant_pack.quantize.files.dialects import DIALECTS

    families = sorted(FAMILIES.values(), key=lambda family: (not family.markers, family.title.lower()))
    table = [["family", "models", "published 4-bit files", *DIALECTS, "LoRA", "workflow"]]
    for family in families:
        formats = [", ".join(precisions(dialect, family.name)) or "-" for dialect in DIALECTS.values()]
        row = [f"**{family.title}**", family.models, family.published or "-", *formats]
        table.append([*row, "stock nodes", workflows(family.name)])
    return table


def precisions(dialect: Any, family: str) -> list[str]:
    """Which number formats a dialect holds for a family."""
    names = f"{dialect.open.__module__.rpartition('.')[0]}.names"  # a dialect that renames layers has a folder of maps
    if importlib.util.find_spec(names) and family not in importlib.import_module(names).NAME_MAPS:
        return []
    formats = next((held for prefix, held in HELD.items() if dialect.name.startswith(prefix)), SPELLED)
    return [SPELLED[format] for format in formats]


def workflows(family: str) -> str:
    """Links to the workflows in `workflows/` for a family: those whose model file is of it."""
    from svdquant_pack.quantize.families import detect
    from svdquant_pack.quantize.files.source import FileSource

    found = []
    for path in sorted((ROOT / "workflows").glob("*.json")):
        text = json.dumps(json.loads(path.read_text()))
        used = [model for model in MODELS.glob("*.safetensors") if model.name in text]
        if path.stem == f"svdquant_{family}" or any(detect(FileSource(m).infos).name == family for m in used):
            found.append(f"[{path.stem.removeprefix('svdquant_')}](workflows/{path.name})")
    return ", ".join(found) or "any, see below"


def render() -> str:
    """The table and what its words mean, without the markers."""
    from svdquant_pack.quantize.families import REFUSED

    lines = ["| " + " | ".join(row) + " |" for row in rows()]
    lines.insert(1, "|" + "---|" * lines[0].count(" | ") + "---|")
    lines += [
        "",
        "A dialect's column says which precisions of the family it can hold; *native* is what this pack writes, "
        "*core* is for ComfyUI's own loader, as its pull request 13580 reads it (NVFP4 becomes INT4, with a note for "
        "each layer). "
        "*Any* workflow: connect the 16-bit MODEL of a workflow you have to `SVDQuant Quantize Model`, or replace its "
        "loader by `SVDQuant Load Model`.",
    ]
    lines += [f"{family.title} is refused: {family.refused}." for family in REFUSED.values()]
    return "\n".join(lines)


def written(text: str) -> str | None:
    """What stands between the markers in README.md, or None without markers."""
    if START not in text or END not in text:
        return None
    return text.split(START, 1)[1].split(END, 1)[0].strip("\n")


def main() -> int:
    spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests" / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    if "--write" not in sys.argv:
        sys.stdout.write(render() + "\n")
        return 0
    readme = ROOT / "README.md"
    text = readme.read_text()
    if written(text) is None:
        sys.stderr.write(f"README.md has no lines {START} and {END}; put them where the table belongs\n")
        return 1
    before, after = text.split(START, 1)[0], text.split(END, 1)[1]
    readme.write_text(f"{before}{START}\n{render()}\n{END}{after}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
