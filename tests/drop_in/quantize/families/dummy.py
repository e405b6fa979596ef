"""A model family in one file: towers of an up and a down projection with a gate in front of them."""

from . import Family

FAMILY = Family(
    name="dummy",
    title="Dummy",
    models="none",
    markers=("towers.#.up.weight", "towers.#.gate.weight"),
    w4a4=("towers.#.{up,gate,down}",),
    w4a16=("towers.#.modulation",),
    shared_input=(("towers.#.up", "towers.#.gate"),),
    keep16={"towers.#.out": "too few outputs"},
)
