"""Random models as Nunchaku stores them, made from the name tables: every byte is random, every size is small."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from svdquant_pack.quantize.files.dialects.nunchaku.layers import V1
from svdquant_pack.quantize.files.dialects.nunchaku.names import NAME_MAPS
from svdquant_pack.quantize.files.dialects.nunchaku.tables import Block, LinearRow, Sizes, StoredName
from svdquant_pack.quantize.files.tensor_file import TensorFile

SYMBOLS = {"h": 128, "mlp": 256}
ANY = 128  # a size that the table leaves open
QUANTIZED = {  # what the published files quantize, by stored name; everything else is 16 bit
    "flux": ("qkv", "out_proj", "mlp", "norm1", "norm.linear", "attn.", "ff", "proj_mlp", "proj_out"),
    "chroma": ("qkv", "out_proj", "mlp", "attn.", "ff", "proj_mlp", "proj_out"),
    "flux2": ("qkv", "out_proj", "mlp", "attn.", "ff"),
    "qwen_image": ("attn.", "img_m", "txt_m"),
    "z_image": ("attention.", "feed_forward"),
    "sdxl": ("attn1", "attn2.to_q", "attn2.to_out", "ff"),
}


def floats(*shape: int, seed: torch.Generator, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=seed) * scale).to(dtype)


def codes(*shape: int, seed: torch.Generator, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), generator=seed, dtype=torch.uint8).view(dtype).view(shape)


def w4a4(
    n: int,
    k: int,
    seed: torch.Generator,
    precision: str = "int4",
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    row_scales: bool = False,
) -> dict[str, torch.Tensor]:
    """One stored W4A4 layer under our part names, merged factors as wcscales where N is a multiple of three."""
    scales = torch.rand(k // (64 if precision == "int4" else 16), n, generator=seed) / 8 + 0.01
    layer = {
        "qweight": codes(n, k // 2, seed=seed),
        "wscales": scales.to(dtype if precision == "int4" else torch.float8_e4m3fn),
        "smooth_factor": (torch.rand(k, generator=seed) + 0.5).to(dtype),
        "bias": floats(n, seed=seed, dtype=dtype),
    }
    layer["smooth_factor_orig"] = layer["smooth_factor"].clone()
    if precision == "nvfp4" and (n % 3 == 0 or row_scales):
        layer["wcscales"] = (torch.rand(n, generator=seed) / 4 + 0.1).to(dtype)
    elif precision == "nvfp4":
        layer["wtscale"] = (torch.rand(1, generator=seed) / 16 + 0.01).to(dtype)
    if rank:
        layer["proj_down"] = floats(k, rank, seed=seed, dtype=dtype, scale=0.1)
        layer["proj_up"] = floats(n, rank, seed=seed, dtype=dtype, scale=0.1)
    return layer


def awq(n: int, k: int, seed: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """One stored W4A16 layer, zero point 7 as the writers have it, no groups but those of K: as the model's class."""
    scales = (torch.rand(k // 64, n, generator=seed) / 8 + 0.01).to(dtype)
    zeros = -7 * scales
    qweight = codes(n // 4, k // 2, seed=seed, dtype=torch.int32)
    return {"qweight": qweight, "wscales": scales, "wzeros": zeros, "bias": floats(n, seed=seed, dtype=dtype)}


def stored_model(
    family: str,
    precision: str = "int4",
    rank: int = 16,
    lite: bool = False,
    blocks: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    modulation: bool = True,
) -> dict[str, torch.Tensor]:
    """A whole model under stored names. Parts of one host layer share smooth_factor, as the writers make them."""
    names, seed, tensors = NAME_MAPS[family], torch.Generator().manual_seed(0), {}
    sizes = Sizes()
    sizes.known = dict(SYMBOLS)
    suffixes = {} if names.v2 or lite else V1
    for block in names.blocks:
        if block.optional and not any(word in block.stored for word in ("down_blocks.1", "up_blocks.0", "mid_block")):
            continue
        for number in range(blocks) if "#" in block.stored else (None,):
            for linear in block.linears:
                _add_linear(
                    tensors, block, number, linear, family, precision, rank, lite, sizes, seed, dtype, modulation
                )
            for stored in block.tensors.values():
                name = stored[-1] if lite else stored[0]
                tensors[block.stored_name(number, name)] = floats(ANY, seed=seed, dtype=dtype)
    return {_suffixed(name, suffixes): tensor.contiguous() for name, tensor in tensors.items()}


def _suffixed(name: str, suffixes: dict[str, str]) -> str:
    module, _, suffix = name.rpartition(".")
    return f"{module}.{suffixes.get(suffix, suffix)}"


def _add_linear(
    tensors: dict[str, torch.Tensor],
    block: Block,
    number: int | None,
    linear: LinearRow,
    family: str,
    precision: str,
    rank: int,
    lite: bool,
    sizes: Sizes,
    seed: torch.Generator,
    dtype: torch.dtype,
    modulation: bool,
) -> None:
    parts: tuple[StoredName, ...] = linear.lite if lite and linear.lite else linear.stored
    shared: torch.Tensor | None = None
    for place, part in enumerate(parts):
        name = block.stored_name(number, part.name)
        n = sizes.value(part.n) or ANY
        k = sizes.value(part.k) or (sum(SYMBOLS.values()) if part.name == "proj_out" and number is not None else ANY)
        n = 3 * n if part.name == "attn1.to_qkv" else n
        quantized = number is not None and part.name.startswith(QUANTIZED[family])
        if part.name in ("attn.to_qkv_mlp_proj", "attn.to_out") and family == "flux2" and lite:
            n, k = (3 * 128 + 512, 128) if "qkv" in part.name else (128, 384)
        if not quantized or (linear.chunks and not modulation):
            tensors[f"{name}.weight"] = floats(n, k, seed=seed, dtype=dtype)
            if linear.bias:
                tensors[f"{name}.bias"] = floats(n, seed=seed, dtype=dtype)
            continue
        layer = (
            awq(n, k, seed, dtype)
            if linear.chunks
            else w4a4(n, k, seed, precision, rank, dtype, family == "sdxl" and not lite)
        )
        if linear.join == "rows" and shared is not None and "smooth_factor" in layer:
            layer["smooth_factor"] = layer["smooth_factor_orig"] = shared
        shared = layer.get("smooth_factor")
        first_of_columns = linear.join == "columns" and place < len(parts) - 1
        if first_of_columns or (not linear.bias and family == "flux2" and not lite):
            layer["bias"] = torch.zeros_like(layer["bias"])
        elif not linear.bias:
            del layer["bias"]
        if lite:
            layer.pop("smooth_factor_orig", None)
        tensors |= {f"{name}.{part_name}": tensor for part_name, tensor in layer.items()}


def save_model(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def legacy_folder(folder: Path, single: Path) -> Path:
    """A Nunchaku file as the folder of two tensor files and two configurations that older releases were."""
    folder.mkdir()
    tensors, metadata = load_file(single), TensorFile(single).metadata
    for name in ("config", "comfy_config"):
        (folder / f"{name}.json").write_text(metadata.pop(name))
    blocks = {key: tensor for key, tensor in tensors.items() if "blocks." in key}
    save_model(folder / "transformer_blocks.safetensors", blocks, metadata)
    rest = {key: tensor for key, tensor in tensors.items() if key not in blocks}
    save_model(folder / "unquantized_layers.safetensors", rest)
    return folder


def quantization_config(precision: str = "int4", rank: int = 16) -> dict[str, str]:
    dtype = "int4" if precision == "int4" else "fp4_e2m1_all"
    return {"quantization_config": json.dumps({"method": "svdquant", "weight": {"dtype": dtype}, "rank": rank})}
