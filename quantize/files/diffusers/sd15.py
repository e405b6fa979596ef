"""Stable Diffusion 1 and 2 in Diffusers' names: the UNet of SDXL without its additional embedding."""

from . import NameTable
from .sdxl import TABLE as SDXL

TABLE = NameTable(
    "Stable Diffusion 1 or 2",
    tuple(marker for marker in SDXL.markers if not marker.startswith("add_embedding")),
    tuple(rule for rule in SDXL.rules if not rule.host.startswith("label_emb")),
    absent=("add_embedding.linear_1.weight", "down_blocks.#.motion_modules.#.norm.weight"),
)
