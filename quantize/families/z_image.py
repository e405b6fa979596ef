"""Z-Image and Z-Image-Turbo: ComfyUI's NextDiT with the small modulation (a bare linear, so its name ends in `.0`)."""

from . import FLAG, POSITIONS, Family, keys

FAMILY = Family(
    name="z_image",
    title="Z-Image",
    models="Z-Image, Z-Image-Turbo",
    published="Nunchaku int4 and fp4",
    markers=(
        "layers.#.attention.qkv.weight",
        "layers.#.feed_forward.w1.weight",
        "layers.#.adaLN_modulation.0.weight",
        "cap_embedder.1.weight",
    ),
    w4a4=(
        "{layers,noise_refiner,context_refiner}.#.attention.{qkv,out}",
        "{layers,noise_refiner,context_refiner}.#.feed_forward.{w1,w2,w3}",
    ),
    keep16={"{layers,noise_refiner}.#.adaLN_modulation.0": "256 inputs: small, and the published files keep it"},
    shared_input=(
        (
            "{layers,noise_refiner,context_refiner}.#.feed_forward.w1",
            "{layers,noise_refiner,context_refiner}.#.feed_forward.w3",
        ),
    ),
    unread=("norm_final.weight",),  # Diffusers drops it as well
    config=keys(FLAG, "z_image_modulation") | keys(POSITIONS, "pad_tokens_multiple"),
)
