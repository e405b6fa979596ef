"""LoRA files of every kind for the 4-bit layers of a model, and the dense model that is the reference."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.nodes.host.patcher import layer_name

RANK = 4
KINDS = ("lora", "lokr", "lokr_low", "loha", "dora_out", "dora_in", "diff", "glora", "oft", "locon_mid")
EXACT_KINDS = ("lora", "lokr", "lokr_low", "loha", "dora_out", "dora_in", "locon_mid")


def tensors_of(kind: str, weight: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of one layer's entry; its delta is of the size of a tenth of the weight."""
    generator = torch.Generator().manual_seed(seed)
    n, k = weight.shape

    def noise(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    alpha = torch.tensor(RANK / 2)
    size = 0.1 * weight.norm().item() / (n * k) ** 0.5
    if kind in ("lora", "dora_out", "dora_in", "locon_mid"):
        made = {"lora_up.weight": noise(n, RANK, scale=size), "lora_down.weight": noise(RANK, k), "alpha": alpha}
        if kind == "locon_mid":
            made = {name: tensor[..., None, None] if tensor.ndim else tensor for name, tensor in made.items()}
            made["lora_mid.weight"] = noise(RANK, RANK, 1, 1)
        if kind == "dora_out":
            made["dora_scale"] = weight.norm(dim=1, keepdim=True) * (1 + noise(n, 1, scale=0.1))
        if kind == "dora_in":
            made["dora_scale"] = weight.norm(dim=0, keepdim=True) * (1 + noise(1, k, scale=0.1))
        return made
    if kind == "lokr":  # of full rank: no columns could hold it
        return {"lokr_w1": noise(8, 8, scale=size), "lokr_w2": noise(n // 8, k // 8), "alpha": alpha}
    if kind == "lokr_low":
        right = {"lokr_w2_a": noise(n // 2, RANK), "lokr_w2_b": noise(RANK, k // 2)}
        return {"lokr_w1_a": noise(2, 1, scale=size), "lokr_w1_b": noise(1, 2), **right, "alpha": alpha}
    if kind == "loha":
        first = {"hada_w1_a": noise(n, RANK, scale=size), "hada_w1_b": noise(RANK, k)}
        return {**first, "hada_w2_a": noise(n, RANK), "hada_w2_b": noise(RANK, k), "alpha": alpha}
    if kind == "diff":
        return {"diff": noise(n, RANK, scale=size) @ noise(RANK, k)}
    if kind == "glora":
        to_weight = {"a1.weight": noise(k, RANK, scale=0.02), "a2.weight": noise(RANK, k, scale=0.02)}
        return {**to_weight, "b1.weight": noise(n, RANK, scale=size), "b2.weight": noise(RANK, k)}
    assert kind == "oft"
    blocks = torch.zeros(n // 16, 16, 16)
    blocks[0] = noise(16, 16, scale=0.05)  # one block of channels: of low rank
    return {"oft_blocks": blocks}


def lora_of(kinds: tuple[str, ...], weights: Mapping[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """A file for all of `weights` (weight key -> dense weight), the kinds dealt out in turn."""
    file = {}
    for index, (key, weight) in enumerate(weights.items()):
        prefix = key.removesuffix(".weight")
        kind = kinds[(index + seed) % len(kinds)]
        file |= {f"{prefix}.{name}": t.contiguous() for name, t in tensors_of(kind, weight, 100 * seed + index).items()}
    return file


def slices_of(patcher, seed: int = 0) -> dict[str, torch.Tensor]:
    """A file with one LoRA for every slice of a fused 4-bit weight that the host knows a name for."""
    import comfy.lora

    file, seen = {}, set()
    for index, (name, target) in enumerate(comfy.lora.model_lora_keys_unet(patcher.model, {}).items()):
        if isinstance(target, str) or len(target) > 2 or target in seen or target[0] not in patcher.packed_layers():
            continue
        seen.add(target)
        key, (dim, start, length) = target
        module = patcher.packed_layers()[key]
        shape = [module.out_features, module.in_features]
        if start + length > shape[dim]:  # the host knows Z-Image's names only, Lumina's k and v are smaller
            continue
        shape[dim] = length
        made = tensors_of("lora", torch.full(shape, 0.05), seed + index)
        file |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
    return file


def as_file(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The tensors as a person's file gives them."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return load_file(path)


def with_file(patcher, lora: Mapping[str, torch.Tensor], strength: float):
    """What the stock LoraLoaderModelOnly node does."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, lora, strength, 0)[0]


def dense_of(checkpoint, path: Path):
    """The 16-bit model at `path` with the decoded weights of a 4-bit checkpoint in place, float32."""
    import comfy.utils

    from svdquant_pack.nodes.host.model import load_pinned_model

    dense = load_pinned_model(str(path))
    for name in checkpoint.specs:
        layer, module = checkpoint.layer(name), comfy.utils.get_attr(dense.model.diffusion_model, name)
        module.weight.data = layer.dense_weight()
        if module.bias is not None:
            module.bias.data = layer.unshifted_bias(checkpoint.tensor(f"{name}.bias")).float()
    return dense


def dense_weights(four_bit, dense) -> dict[str, torch.Tensor]:
    """weight key -> dense weight of every 4-bit layer."""
    import comfy.utils

    layers = (layer_name(key) for key in four_bit.packed_layers())
    return {f"diffusion_model.{n}.weight": comfy.utils.get_attr(dense.model.diffusion_model, n).weight for n in layers}


def layer_errors(four_bit, dense, rows: int = 3) -> dict[str, float]:
    """weight key -> ||y - y_dense|| / ||y_dense|| of every 4-bit layer, both models loaded by the host."""
    import comfy.model_management
    import comfy.utils

    comfy.model_management.load_models_gpu([four_bit])
    comfy.model_management.load_models_gpu([dense])
    generator, errors = torch.Generator().manual_seed(0), {}
    with torch.no_grad():
        for key, module in four_bit.packed_layers().items():
            other = comfy.utils.get_attr(dense.model.diffusion_model, layer_name(key))
            x = torch.randn(2, rows, module.in_features, generator=generator).to(four_bit.load_device)
            wanted = other(x)
            errors[key] = ((module(x) - wanted).norm() / wanted.norm()).item()
    return errors
