"""Z-Image in Diffusers' names, ZImageTransformer2DModel."""

from ..dialects.nunchaku.names.z_image import NAMES
from . import NameTable, rules_of

TABLE = NameTable(
    "Z-Image",
    ("all_x_embedder.2-1.weight", "layers.#.attention.to_q.weight", "layers.#.feed_forward.w1.weight"),
    rules_of(NAMES),
)
