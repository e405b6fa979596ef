"""Lumina-Image 2.0: ComfyUI's NextDiT with SiLU before the modulation linear, so its name ends in `.1`."""

from . import Family

FAMILY = Family(
    name="lumina2",
    title="Lumina 2",
    models="Lumina-Image 2.0, NetaYume",
    markers=(
        "layers.#.attention.qkv.weight",
        "layers.#.feed_forward.w1.weight",
        "layers.#.adaLN_modulation.1.weight",
        "cap_embedder.1.weight",
    ),
    w4a4=(
        "{layers,noise_refiner,context_refiner}.#.attention.{qkv,out}",
        "{layers,noise_refiner,context_refiner}.#.feed_forward.{w1,w2,w3}",
    ),
    keep16={"{layers,noise_refiner}.#.adaLN_modulation.1": "its rounding reaches every token"},
    shared_input=(
        (
            "{layers,noise_refiner,context_refiner}.#.feed_forward.w1",
            "{layers,noise_refiner,context_refiner}.#.feed_forward.w3",
        ),
    ),
    unread=("norm_final.weight",),  # Diffusers drops it as well
)
