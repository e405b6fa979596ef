"""What a file may say of the model that is built for it: keys, types and bounds of ComfyUI's model configuration.

A host finds most of it from names and shapes of the tensors. The rest comes from the file and goes into the model's
constructor, so nothing gets there that is not in a table: the one below, or that of a family (`Family.config`). No
number may ask for a model that is larger than the tensors in the file.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

LONGEST = 64  # entries of a list
MOST_POSITIONS = 1 << 16  # tokens, pixels or frames that a table of positions is made for
NUMBERED = re.compile(r"(.*?)(?<![^.a-z])(\d+)(?:\.|$)")  # blocks.7.x, and blocks.block7.x
WORD = re.compile(r"[A-Za-z0-9_.+-]{1,32}")


class ConfigError(ValueError):
    """A model configuration is not allowed. The message names the key, what came, and what is needed."""


@dataclass(frozen=True)
class Extent:
    """What a model with tensors of these shapes can have.

    blocks    layers that the first number in their names tells apart, of all kinds together
    largest   the largest dimension
    elements  numbers in all tensors together
    """

    names: Iterable[str]
    shapes: Iterable[tuple[int, ...]]

    @cached_property
    def blocks(self) -> int:
        numbers: dict[str, set[str]] = defaultdict(set)
        for name in self.names:
            found = NUMBERED.match(name)
            if found:
                numbers[found[1]].add(found[2])
        return sum(map(len, numbers.values()))

    @cached_property
    def largest(self) -> int:
        return max((size for shape in self.shapes for size in shape), default=0)

    @cached_property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Kind:
    """What a key may hold: fits(value, extent), and in words what is needed. `listed`: a list of them as well."""

    fits: Callable[[Any, Extent], bool]
    needed: str
    listed: bool = False
    optional: bool = False

    def allows(self, value: object, extent: Extent) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, list | tuple):
            return self.listed and len(value) <= LONGEST and all(self.fits(entry, extent) for entry in value)
        return self.fits(value, extent)


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _real(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most  # NaN is not


BLOCKS = Kind(lambda v, e: _whole(v, 0, e.blocks), "no more layers than the tensors' names count", listed=True)
SIZE = Kind(lambda v, e: _whole(v, 1, e.largest), "1 to the largest dimension of a tensor", True, optional=True)
POSITIONS = Kind(lambda v, e: _whole(v, 1, MOST_POSITIONS), f"1 to {MOST_POSITIONS}", True, optional=True)
PATCH = Kind(lambda v, e: _whole(v, 1, 64), "1 to 64", listed=True)
INDEX = Kind(lambda v, e: _whole(v, -1, 1024), "-1 to 1024", listed=True)
HEADS = Kind(lambda v, e: _whole(v, 1, e.largest), "1 to the largest dimension of a tensor")
AXES = Kind(
    lambda v, e: (
        isinstance(v, list | tuple)  # never one number: each entry is checked here
        and 0 < len(v) <= 8
        and all(_whole(size, 0, e.largest) and size % 2 == 0 for size in v)
    ),
    "a list of even numbers",
)
NUMBER = Kind(lambda v, e: _real(v, -1e12, 1e12), "a number", listed=True, optional=True)
BASE = Kind(lambda v, e: _real(v, 1, 1e12), "a number of 1 or more")
RATIO = Kind(lambda v, e: _real(v, 1 / 64, 256), "a number from 1/64 to 256", optional=True)
FLAG = Kind(lambda v, e: isinstance(v, bool), "true or false", listed=True)
NAME = Kind(lambda v, e: isinstance(v, str) and WORD.fullmatch(v) is not None, "a short word", optional=True)
FLAG_OR_NAME = Kind(lambda v, e: FLAG.fits(v, e) or NAME.fits(v, e), "true, false or a short word", optional=True)


def _is_linear(value: object, extent: Extent) -> bool:
    """{"target": "torch.nn.Linear", "params": {"in_features", "out_features"}}, as SD3 has it, and no other target"""
    if not isinstance(value, dict) or value.get("target") != "torch.nn.Linear" or len(value) != 2:
        return False
    sizes = value.get("params")
    return (
        isinstance(sizes, dict)
        and sizes.keys() == {"in_features", "out_features"}
        and all(_whole(size, 1, extent.largest) for size in sizes.values())
    )


LINEAR = Kind(_is_linear, "a torch.nn.Linear with in_features and out_features")


def keys(kind: Kind, names: str) -> dict[str, Kind]:
    """The same kind for all of `names`, which are separated by spaces"""
    return dict.fromkeys(names.split(), kind)


COMMON: dict[str, Kind] = {
    **keys(NAME, "image_model model_type pos_emb_cls pos_emb_interpolation num_classes"),
    **keys(
        BLOCKS,
        "depth depth_single_blocks num_layers num_single_layers num_blocks n_layers n_double_layers n_refiner_layers "
        "num_refiner_layers num_res_blocks transformer_depth transformer_depth_output transformer_depth_middle",
    ),
    **keys(
        SIZE,
        "hidden_size dim inner_dim model_channels in_channels out_channels in_dim out_dim hidden_dim ffn_dim "
        "context_in_dim context_dim vec_in_dim vision_in_dim adm_in_channels text_dim text_emb_dim cap_feat_dim "
        "caption_channels cross_attention_dim joint_attention_dim attention_head_dim crossattn_emb_channels "
        "adaln_lora_dim freq_dim time_dim",
    ),
    **keys(HEADS, "num_heads n_heads n_kv_heads num_kv_heads num_attention_heads"),
    **keys(AXES, "axes_dim axes_dims axes_dims_rope axes_dim_rope"),
    **keys(PATCH, "patch_size patch_spatial patch_temporal channel_mult"),
    **keys(POSITIONS, "axes_lens image_size input_size max_img_h max_img_w max_frames max_seq max_resolution"),
    **keys(BASE, "theta rope_theta time_scale timestep_scale"),
    **keys(RATIO, "mlp_ratio ffn_dim_multiplier"),
    **keys(NUMBER, "eps norm_eps pe_interpolation"),
    **keys(INDEX, "txt_ids_dims"),
    **keys(FLAG_OR_NAME, "qk_norm"),
    **keys(
        FLAG,
        "qkv_bias ops_bias guidance_embed use_checkpoint use_spatial_transformer use_linear_in_transformer "
        "use_temporal_resblock use_temporal_attention legacy concat_padding_mask use_adaln_lora cross_attn_norm "
        "pos_emb_learnable extra_per_block_abs_pos_emb learn_sigma global_modulation mlp_silu_act",
    ),
}


def check_config(config: Mapping[str, Any], extent: Extent, more: Mapping[str, Kind]) -> None:
    """Raise ConfigError for a key that no table has, and for a value of another type or beyond the tensors.

    more  keys that only this family has
    """
    known = {**COMMON, **more}
    for key, value in config.items():
        if key not in known:
            raise ConfigError(f"the file sets {key!r} of the model that is built for it, which no file may set")
        kind = known[key]
        if not (kind.fits(value, extent) if kind is AXES else kind.allows(value, extent)):
            raise ConfigError(f"{key} of the model is {value!r:.60} in the file, needed {kind.needed}")
    _check_volume(config, extent)


def _check_volume(config: Mapping[str, Any], extent: Extent) -> None:
    """Each block of a transformer has a weight of (ratio * hidden, hidden), and all of them are in the file."""
    hidden = config.get("hidden_size") or config.get("dim") or 0
    blocks = [config.get(key) for key in ("depth", "depth_single_blocks", "num_layers")]
    count = sum(depth for depth in blocks if isinstance(depth, int))
    needed = max(1, count) * max(1, config.get("mlp_ratio") or 1) * hidden**2
    if needed > extent.elements:
        raise ConfigError(
            f"the file sets a model of {count} blocks with hidden size {hidden}, {needed:,.0f} numbers or more, and "
            f"holds {extent.elements:,}"
        )
