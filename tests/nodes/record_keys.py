"""Write tests/quantize/golden_keys from the ComfyUI in COMFYUI_PATH: python -m pytest tests/nodes/record_keys.py

Only what that ComfyUI can build is written; a family that needs a newer one is recorded with that one.
"""

import json
from pathlib import Path

import pytest

from svdquant_pack.tests.nodes import zoo

GOLDEN = Path(__file__).resolve().parents[1] / "quantize" / "golden_keys"


@pytest.mark.parametrize("name", zoo.ZOO)
def test_record(name):
    if reason := zoo.missing(name):
        pytest.skip(reason)
    lines = [f"{json.dumps(kind)}: {{\n{entries}\n}}" for kind, entries in _lines(zoo.skeleton(zoo.build(name)))]
    (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _lines(skeleton):
    for kind, names in skeleton.items():
        yield kind, ",\n".join(f" {json.dumps(name)}: {json.dumps(shapes)}" for name, shapes in names.items())
