"""What we write into the header of a Nunchaku file: everything that the model's class is built from."""

import json
from collections.abc import Mapping
from typing import Any

from .....kernels.bounded_json import read_object
from .....kernels.formats import DEFAULT, FORMATS
from .....kernels.layer import LayerSpec
from ...header import metadata_of
from .layers import NAME, has_byte_scales
from .save_run import SaveRun


def metadata(run: SaveRun) -> dict[str, str]:
    """The header's strings. What a file of others said of itself is kept, and completed."""
    checkpoint, names = run.checkpoint, run.names
    infos, known = checkpoint.weight_infos(), checkpoint.provenance.unet_config
    kept = {key: text for key, text in checkpoint.metadata.items() if key != "quantization_config"}
    ours = metadata_of(checkpoint.provenance, {})
    if run.shapes:
        ours["svdquant"] = json.dumps({**read_object(ours["svdquant"], "svdquant"), "shapes": run.shapes})
    config = {"_class_name": names.class_name, **names.config(infos, known)}
    made = {"model_class": names.model_class}
    if names.comfy is not None:
        made["comfy_config"] = json.dumps(names.comfy(infos, known))
    config |= read_object(kept.pop("config", "{}"), f"{checkpoint.path.name}: config in the header")
    quantization = _quantization_config(run.formats, run.rank) | run.skipped
    return {
        **made,
        **kept,
        **ours,
        "config": json.dumps(config),
        "quantization_config": json.dumps(quantization),
    }


def _quantization_config(specs: Mapping[str, LayerSpec], rank: int) -> dict[str, Any]:
    """As Nunchaku writes it"""
    fmt = next((spec.fmt for spec in specs.values() if spec.fmt.low_rank), FORMATS[DEFAULT])
    scale = "fp8_e4m3_nan" if has_byte_scales(fmt) else None
    kind = {"dtype": fmt.spellings[NAME][0], "scale_dtype": scale and [None, scale], "group_size": fmt.group_size}
    return {"method": "svdquant", "weight": kind, "activation": {**kind, "scale_dtype": scale}, "rank": rank}
