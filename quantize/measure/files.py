"""Compare two files layer by layer: a 4-bit model with its source, or two 4-bit models."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..files.open import is_4bit, open_checkpoint
from ..files.source import FileSource


def dense_weights(path: str | Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    """(layer -> shape, layer -> its weight as one float32 matrix), for a 4-bit model or any 16-bit source."""
    if is_4bit(path):
        checkpoint = open_checkpoint(path)
        infos = checkpoint.weight_infos()

        def read(layer: str) -> torch.Tensor:
            if layer in checkpoint.specs:
                return checkpoint.layer(layer).dense_weight()
            return checkpoint.tensor(f"{layer}.weight").float()
    else:
        source = FileSource(path)
        infos = source.infos

        def read(layer: str) -> torch.Tensor:
            return source.tensor(f"{layer}.weight").float()

    shapes: dict[str, tuple[int, ...]] = {
        key.removesuffix(".weight"): info.shape
        for key, info in infos.items()
        if key.endswith(".weight") and len(info.shape) == 2
    }
    return shapes, read


def compare_files(a: str | Path, b: str | Path) -> dict[str, float]:
    """layer -> ||A - B|| / ||A||, largest first, over the linear layers that both files have and that differ

    raises  ValueError when the files share no layer or a layer's shapes differ

        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     a, b = f"{folder}/a.safetensors", f"{folder}/b.safetensors"
        ...     save_file({f"blocks.{i}.proj.weight": torch.ones(128, 128) for i in range(2)}, a)
        ...     save_file({f"blocks.{i}.proj.weight": torch.full((128, 128), 1 + i / 4) for i in range(2)}, b)
        ...     compare_files(a, b)
        {'blocks.1.proj': 0.25}
    """
    (shapes_a, read_a), (shapes_b, read_b) = dense_weights(a), dense_weights(b)
    common = [layer for layer in shapes_a if layer in shapes_b]
    if not common:
        raise ValueError(f"{Path(a).name} and {Path(b).name} have no linear layer in common: different models")
    errors = {}
    for layer in common:
        if shapes_a[layer] != shapes_b[layer]:
            raise ValueError(
                f"layer {layer!r} is {shapes_a[layer]} in {Path(a).name} and {shapes_b[layer]} in {Path(b).name}"
            )
        left, right = read_a(layer), read_b(layer)
        scale = left.norm()
        errors[layer] = ((left - right).norm() / torch.where(scale == 0, 1, scale)).item()
    return dict(sorted(((layer, error) for layer, error in errors.items() if error), key=lambda item: -item[1]))
