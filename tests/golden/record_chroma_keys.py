"""Record what spooknik/nunchaku-chroma's own model class expects: python record_chroma_keys.py NUNCHAKU CHROMA FOLDER

    git clone https://github.com/nunchaku-tech/nunchaku                      # recorded: 3a3cc3d
    git clone https://github.com/spooknik/nunchaku-chroma                    # recorded: 9a03185
    pip install --target PEER --no-deps diffusers==0.36.0 transformers==4.57.1 huggingface_hub==0.36.0 \\
        tokenizers==0.22.1 accelerate peft
    PYTHONPATH=PEER python tests/golden/record_chroma_keys.py nunchaku nunchaku-chroma tests/golden/peer_keys

Of both only the Python source is used: the compiled module is replaced by one whose names do nothing, because building
a model calls none of them. tonera/nunchaku has no class that could be built so; its names are those of its source.
"""

import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "axes_dims_rope": [16, 24, 24],
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 96,
    "approximator_layers": 2,
}
RANK = 32
LIST = re.compile(r"\"([^\"]+)\": (\[.*?\])(?=,?\n(?:\"|\}))", re.S)  # a member of an object
PACKAGES = ("", ".models", ".models.transformers", ".models.attention_processors", ".ops")


class Nothing(types.ModuleType):
    """A module that has every name, each an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _on_one_line(found: re.Match[str]) -> str:
    return f'"{found[1]}": {json.dumps(json.loads(found[2]))}'


def main(nunchaku: Path, chroma: Path, folder: Path) -> None:
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # nothing here needs one
    for package in PACKAGES:  # without their `__init__`, which asks for text encoders
        module = types.ModuleType(f"nunchaku{package}")
        module.__path__ = [str(nunchaku / "nunchaku" / package.replace(".", "/").lstrip("/"))]
        sys.modules[module.__name__] = module
    for name in ("nunchaku._C", "nunchaku._C.ops", "nunchaku._C.utils"):
        sys.modules[name] = Nothing(name)
    source = chroma / "nunchaku_chroma" / "transformer_chroma.py"
    spec = importlib.util.spec_from_file_location("transformer_chroma", source)
    assert spec is not None and spec.loader is not None
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)

    import torch

    for precision in ("int4", "nvfp4"):
        model = peer.NunchakuChromaTransformer2DModel(**CONFIG).to(torch.bfloat16)
        model._patch_model(precision=precision, rank=RANK)
        tensors = {
            key: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for key, tensor in sorted(model.state_dict().items())
        }
        unsigned = [name for name, each in model.named_modules() if getattr(each, "act_unsigned", False)]
        record = {
            "class": type(model).__name__,
            "config": CONFIG,
            "options": {},
            "peer": "nunchaku-chroma, source 9a03185",
            "precision": precision,
            "rank": RANK,
            "tensors": tensors,
            "unsigned": sorted(unsigned),
        }
        text = LIST.sub(_on_one_line, json.dumps(record, indent=0, sort_keys=True))
        (folder / f"chroma_{precision}_r{RANK}.json").write_text(f"{text}\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
