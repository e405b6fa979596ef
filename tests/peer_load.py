"""Load a Nunchaku file strictly into the class of Nunchaku that its header names.

    python tests/peer_load.py --nunchaku CHECKOUT FILE [FILE ...]

Needs no GPU, and of Nunchaku only its Python source (github.com/nunchaku-tech/nunchaku; commit 3a3cc3d was recorded in
tests/golden/peer_keys): its compiled module is replaced by one whose names do nothing, because building and loading a
model calls none of them. What else it imports goes into a folder of its own:

    pip install --no-deps --target PEER diffusers==0.36.0 transformers==4.57.1 huggingface_hub==0.36.0 \\
        tokenizers==0.22.1 accelerate peft
    PYTHONPATH=PEER python tests/peer_load.py --nunchaku nunchaku flux_nunchaku.safetensors

Prints one line per file; the exit status is 1 if one does not load. Beyond the recorded keys this shows that the
header builds the class, and that its own renaming and filling in leave nothing over.
"""

import argparse
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

CLASSES = {  # model_class of the header -> module and class that load such a file today
    "NunchakuFluxTransformer2dModel": ("transformers.transformer_flux_v2", "NunchakuFluxTransformer2DModelV2"),
    "NunchakuQwenImageTransformer2DModel": (
        "transformers.transformer_qwenimage",
        "NunchakuQwenImageTransformer2DModel",
    ),
    "NunchakuZImageTransformer2DModel": ("transformers.transformer_zimage", "NunchakuZImageTransformer2DModel"),
    "NunchakuSDXLUNet2DConditionModel": ("unets.unet_sdxl", "NunchakuSDXLUNet2DConditionModel"),
}
PACKAGES = ("", ".models", ".models.transformers", ".models.unets", ".models.attention_processors", ".ops")
PRECISIONS = {"int4": "int4", "fp4_e2m1_all": "nvfp4"}


class Nothing(types.ModuleType):
    """A module that has every name, each an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def make_importable(root: Path) -> None:
    """Nunchaku's modules without its `__init__`, which asks for text encoders, and without its compiled module."""
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # nothing here needs one, and a broken one is common
    for package in PACKAGES:
        module = types.ModuleType(f"nunchaku{package}")
        module.__path__ = [str(root / "nunchaku" / package.replace(".", "/").lstrip("/"))]
        sys.modules[module.__name__] = module
    for name in ("nunchaku._C", "nunchaku._C.ops", "nunchaku._C.utils"):
        sys.modules[name] = Nothing(name)


def load(path: Path) -> Any:
    """The peer's model of a file. Raises whatever the peer raises."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no dict
    module_name, class_name = CLASSES[metadata["model_class"]]
    module = importlib.import_module(f"nunchaku.models.{module_name}")
    precision = PRECISIONS[json.loads(metadata["quantization_config"])["weight"]["dtype"]]
    module.get_precision = lambda *_, **__: precision  # type: ignore[attr-defined]  # it would ask the GPU
    dtype = torch.float16 if "F16" in kinds else torch.bfloat16
    return getattr(module, class_name).from_pretrained(path, torch_dtype=dtype, device="cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--nunchaku", type=Path, required=True, help="the checkout of Nunchaku")
    options = parser.parse_args()
    make_importable(options.nunchaku)
    failed = 0
    for path in options.files:
        try:
            model = load(path)
        except Exception as error:
            failed += 1
            print(f"{path.name}: FAILED {type(error).__name__}: {error}")
        else:
            print(f"{path.name}: {type(model).__name__}, {len(model.state_dict())} tensors")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
