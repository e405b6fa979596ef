"""Recorded files of the reference packers, see tests/golden/README.md."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "public"
SIDECARS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))
}
DIFFUSERS_DOUBLE = {  # a module of a double block in FLUX.1's first generation of files -> in Diffusers' names
    "qkv_proj": "attn.to_qkv",
    "qkv_proj_context": "attn.add_qkv_proj",
    "out_proj": "attn.to_out.0",
    "out_proj_context": "attn.to_add_out",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
    "mlp_context_fc1": "ff_context.net.0.proj",
    "mlp_context_fc2": "ff_context.net.2",
}
DIFFUSERS_SINGLE = {"qkv_proj": "attn.to_qkv", "out_proj": "attn.to_out"}


def of_kind(kind: str) -> list[str]:
    return [name for name, sidecar in SIDECARS.items() if sidecar["kind"] == kind]


def path_of(name: str) -> Path:
    return FOLDER / SIDECARS[name]["file"]


def tensors_of(name: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`, without it, checked against the sidecar."""
    tensors = load_file(path_of(name))
    for key, recorded in SIDECARS[name]["tensors"].items():
        assert sha256(tensors[key]) == recorded["sha256"], f"{name}: {key} is not what its sidecar says"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
