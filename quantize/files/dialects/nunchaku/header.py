"""What the header of a Nunchaku file says in words. Hints only: names, sizes, precision and rank come from tensors.

config               Diffusers' model configuration, JSON; may hold Nunchaku Lite's quantization_config
comfy_config         {"model_class", "model_config"}, JSON: ComfyUI's configuration (FLUX.1)
model_class          name of Nunchaku's class
quantization_config  JSON {"method", "weight": {"dtype"}, "rank"}, or Nunchaku Lite's
svdquant             JSON, ours: "shapes" {stored layer: [N, K]} of padded layers, beside what the native
                     checkpoint has there
"""

from collections.abc import Iterable, Mapping
from typing import Any

from .....kernels.formats import FORMATS
from .....kernels.layer import RANK_TILE, LayerSpec
from ...checkpoint import CheckpointError
from ...header import entry
from ...tensor_file import TensorFile
from .layers import up_to
from .names import NAME_MAPS
from .tables import NameMap

PRECISIONS = {  # what headers call a format with a low-rank branch
    word: fmt.name
    for fmt in FORMATS.values()
    for dialect in ("nunchaku", "nunchaku lite")
    for word in fmt.spellings.get(dialect, ())
    if fmt.low_rank
}
WRITERS_DEFAULT_RANK = 32  # what Nunchaku's merge tool writes where it finds no `lora_down`, whatever the rank is


def detect_names(keys: Iterable[str], file: str) -> NameMap:
    """The one family whose names the tensors have. Raises CheckpointError that says what to do."""
    keys = list(keys)
    found = [names for names in NAME_MAPS.values() if names.detect(keys)]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{file}: matches several families: {', '.join(names.name for names in found)}")
    if any(key.endswith((".ff.inverted_conv.qweight", ".attn.pag_to_v.qweight")) for key in keys):
        raise CheckpointError(
            f"{file}: is a SANA model. ComfyUI has no model class for SANA, so it cannot run here; "
            "use Nunchaku with Diffusers for it."
        )
    layer = next(key for key in keys if key.endswith(".qweight")).removesuffix(".qweight")
    raise CheckpointError(
        f"{file}: holds 4-bit layers of no known family, first {layer!r}; known are {', '.join(NAME_MAPS)}. "
        "`python -m quantize convert --as-is` unpacks it under its own names."
    )


def foreign_format(suffix: str) -> str:
    """A hint for tensors of other 4-bit formats."""
    if suffix in ("scales", "scaled_zeros", "qzeros", "g_idx"):
        return (
            "It looks like an AWQ or GPTQ text encoder (such as awq-int4 T5), not a diffusion model: load a 16-bit or "
            "fp8 text encoder in the host's own node."
        )
    return ""


def says_lite(file: TensorFile) -> bool:
    """Whether the header calls the file Nunchaku Lite."""
    configs = entry(file, "quantization_config"), entry(file, "config").get("quantization_config")
    return any(isinstance(config, dict) and config.get("quant_method") == "nunchaku_lite" for config in configs)


def shape_hints(file: TensorFile) -> dict[str, tuple[int, int]]:
    """stored layer -> logical (N, K), of the layers that our writer had to pad"""
    shapes = entry(file, "svdquant").get("shapes", {})
    if not isinstance(shapes, dict):
        raise CheckpointError(f"{file.path.name}: shapes in the header is no object")
    for layer, shape in shapes.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
            raise CheckpointError(f"{file.path.name}: layer {layer!r}: the header says shape {shape}, needed [N, K]")
    return {layer: (shape[0], shape[1]) for layer, shape in shapes.items()}


def check_stated(file: TensorFile, specs: Mapping[str, LayerSpec]) -> None:
    """Raise CheckpointError if the header states a precision or a rank that no layer has."""
    stated = entry(file, "quantization_config")
    lite, weight = stated.get("svdq_w4a4"), stated.get("weight")
    layers = {name: spec for name, spec in specs.items() if spec.fmt.low_rank}
    if not layers:
        return
    name, spec = next(iter(layers.items()))
    word = (
        lite.get("precision") if isinstance(lite, dict) else weight.get("dtype") if isinstance(weight, dict) else None
    )
    precision = PRECISIONS.get(word) if isinstance(word, str) else None
    if word is not None and precision not in {spec.format for spec in layers.values()}:
        raise CheckpointError(
            f"{file.path.name}: layer {name!r}: the header says {word}, its tensors are {spec.format}. "
            "The header was edited or belongs to another file."
        )
    rank = (lite if isinstance(lite, dict) else stated).get("rank")
    ranks = _stored_ranks(file)
    if rank is None or not ranks:
        return
    habit = rank == WRITERS_DEFAULT_RANK and not any(key.endswith(".lora_down") for key in file)
    if type(rank) is not int or (up_to(rank, RANK_TILE) not in ranks and not habit):
        raise CheckpointError(
            f"{file.path.name}: layer {name!r}: the header says rank {rank}, the tensors have "
            f"{', '.join(map(str, sorted(ranks)))}. The header was edited or belongs to another file."
        )


def _stored_ranks(file: TensorFile) -> set[int]:
    infos = (info for key, info in file.infos.items() if key.endswith((".lora_down", ".proj_down")))
    return {info.shape[1] for info in infos if len(info.shape) == 2}


def unet_config(file: TensorFile) -> dict[str, Any]:
    """ComfyUI's model configuration as the header has it: ours, else Nunchaku's."""
    ours = entry(file, "unet_config")
    theirs = entry(file, "comfy_config").get("model_config")
    return ours or (theirs if isinstance(theirs, dict) else {})
