"""Names of layers in LoRA files as those that a host knows: trainers wrap and spell the same model in many ways."""

import re
from collections.abc import Collection, Iterable, Iterator

# what trainers put in front of a model's own names, one inside the other
WRAPPERS = (
    "base_model.model.",
    "pipe.dit.",
    "pipe.transformer.",
    "pipe.unet.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "dit.",
    "module.",
    "model.",
)
# what a tensor of a LoRA is called behind the layer's name; the name of a PEFT adapter may be in it
END = re.compile(
    r"(?P<layer>.+?)(?P<end>[._]lora[._].+|\.alpha|\.dora_scale|\.diff|\.diff_b|\.set_weight|\.hada_\w+|\.lokr_\w+"
    r"|\.oft_\w+|\.[ab][12]\.weight|\.[wb]_norm|\.reshape_weight)"
)
ADAPTER = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.(?!weight$|default\.weight$)\w+\.weight")
XLABS = re.compile(r"(?:.*\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight")
XLABS_LAYERS = {
    ("double", "qkv", "1"): "img_attn.qkv",
    ("double", "qkv", "2"): "txt_attn.qkv",
    ("double", "proj", "1"): "img_attn.proj",
    ("double", "proj", "2"): "txt_attn.proj",
    ("single", "qkv", ""): "linear1_qkv",
    ("single", "proj", ""): "linear2",
}


def renamed(keys: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """{key in a file: the same key with a layer's name that the host knows}, of the keys that need another.

    known  the names of layers that the host has, in all spellings that it reads

        >>> renamed(["pipe.dit.blocks.0.q.lora_A.default.weight", "te.lora_A.weight"], {"diffusion_model.blocks.0.q"})
        {'pipe.dit.blocks.0.q.lora_A.default.weight': 'diffusion_model.blocks.0.q.lora_A.default.weight'}
    """
    keys = list(keys)
    found: dict[str, str] = {}
    taken = set(keys)
    for key in keys:
        new = _xlabs(key) or _named(key, known)
        if new is not None and new not in taken:
            found[key] = new
            taken.add(new)
    return found


def _named(key: str, known: Collection[str]) -> str | None:
    match = END.fullmatch(key)
    if match is None:
        return None
    end = ADAPTER.sub(r"\1.weight", match["end"])
    if match["layer"] in known:
        return None if end == match["end"] else match["layer"] + end
    return next((layer + end for layer in _spellings(match["layer"]) if layer in known), None)


def _spellings(layer: str) -> Iterator[str]:
    """Every name that a host may have for a layer, without its wrappers one after the other."""
    while True:
        bare = layer.replace(".processor.", ".")
        for name in (bare, f"{bare}.0") if bare.endswith("to_out") else (bare,):
            flat = name.replace(".", "_")
            yield from (name, f"diffusion_model.{name}", f"transformer.{name}")
            yield from (f"lora_unet_{flat}", f"lora_transformer_{flat}", f"lycoris_{flat}")
        wrapper = next((wrapper for wrapper in WRAPPERS if layer.startswith(wrapper)), None)
        if wrapper is None:
            return
        layer = layer.removeprefix(wrapper)


def _xlabs(key: str) -> str | None:
    """XLabs names the attention processor of a FLUX.1 block, not its layers."""
    match = XLABS.fullmatch(key)
    if match is None:
        return None
    kind, number, part, which, side = match.groups()
    layer = XLABS_LAYERS.get((kind, part, which))
    return layer and f"diffusion_model.{kind}_blocks.{number}.{layer}.lora_{side}.weight"
