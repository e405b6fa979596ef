"""Node: SVDQuant Compare."""

import math
from typing import Any

import comfy.samplers
import torch

from ..quantize.measure import pictures as metrics
from .host.side_by_side import Sampling, Trajectory, sample, velocity_errors


class SVDQuantCompare:
    DESCRIPTION = (
        "Runs a 16-bit and a 4-bit MODEL from the same noise and measures how far apart they are: velocity error along "
        "the 16-bit trajectory, PSNR of the latents, and with a VAE PSNR, SSIM and LPIPS of the pictures. A second "
        "16-bit run beside it shows how much of that is noise of the machine."
    )
    CATEGORY = "SVDQuant"
    FUNCTION = "compare"
    RETURN_TYPES = ("IMAGE", "STRING", "LATENT", "LATENT")
    RETURN_NAMES = ("side_by_side", "report", "latent_16bit", "latent_4bit")
    OUTPUT_TOOLTIPS = (
        "16-bit on the left, 4-bit on the right; without a VAE the mean over the latent's channels.",
        "The figures as text.",
        "What the 16-bit model made.",
        "What the 4-bit model made.",
    )
    OUTPUT_NODE = True
    SEARCH_ALIASES = ("psnr", "ssim", "lpips", "benchmark")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model_16bit": ("MODEL", {"tooltip": "The model that the 4-bit one was made from."}),
                "model_4bit": ("MODEL", {"tooltip": "The 4-bit model."}),
                "positive": ("CONDITIONING", {"tooltip": "The prompt."}),
                "negative": ("CONDITIONING", {"tooltip": "The negative prompt; unused at cfg 1."}),
                "latent": ("LATENT", {"tooltip": "Where sampling starts; an empty latent as for any sampler."}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63, "tooltip": "Of the noise both start from."}),
                "steps": ("INT", {"default": 20, "min": 1, "max": 1000, "tooltip": "Sampling steps."}),
                "cfg": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0, "tooltip": "Guidance."}),
                "sampler": (comfy.samplers.KSampler.SAMPLERS, {"tooltip": "As in KSampler."}),
                "scheduler": (comfy.samplers.KSampler.SCHEDULERS, {"tooltip": "As in KSampler."}),
            },
            "optional": {"vae": ("VAE", {"tooltip": "Decodes both latents, so that pictures can be compared."})},
        }

    def compare(
        self,
        model_16bit: Any,
        model_4bit: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, torch.Tensor],
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        scheduler: str,
        vae: Any = None,
    ) -> dict[str, Any]:
        how = Sampling(positive, negative, latent, seed, steps, cfg, sampler, scheduler)
        trajectory = Trajectory()
        exact = sample(model_16bit, how, trajectory)
        again = sample(model_16bit, how)
        velocities = velocity_errors(model_4bit, trajectory)
        got = sample(model_4bit, how)
        pictures = [_decode(vae, samples) for samples in (exact, got, again)]
        text = report(velocities, exact, got, again, pictures if vae is not None else None)
        side_by_side = torch.cat(pictures[:2], dim=2)
        result = (side_by_side, text, {"samples": exact}, {"samples": got})
        return {"ui": {"text": [text]}, "result": result}


def _decode(vae: Any, samples: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) in 0..1"""
    if vae is not None:
        images = vae.decode(samples)
        return images.reshape(-1, *images.shape[-3:]).cpu()  # videos: every frame is a picture
    gray = samples.float().mean(1, keepdim=True).movedim(1, -1)
    gray = gray.reshape(-1, *gray.shape[-3:])
    low, high = gray.amin(), gray.amax()
    return ((gray - low) / (high - low).clamp_min(1e-12)).repeat(1, 1, 1, 3)


def report(
    velocities: list[float],
    exact: torch.Tensor,
    got: torch.Tensor,
    again: torch.Tensor,
    pictures: list[torch.Tensor] | None,
) -> str:
    """The figures of a comparison as text."""
    worst = max(range(len(velocities)), key=velocities.__getitem__)
    lines = [
        f"velocity error    {sum(velocities) / len(velocities):.4f} mean over {len(velocities)} calls on the 16-bit "
        f"trajectory, worst {velocities[worst]:.4f} (call {worst + 1})",
        f"latent PSNR       {_db(metrics.latent_psnr(got, exact))}",
        f"  16-bit twice    {_db(metrics.latent_psnr(again, exact))}",
    ]
    if pictures is None:
        return "\n".join([*lines, "pictures          not compared: no VAE is connected"])
    left, right, second = pictures
    lines += [
        f"image PSNR        {_db(metrics.psnr(right, left))}",
        f"  16-bit twice    {_db(metrics.psnr(second, left))}",
    ]
    left, right = left.movedim(-1, 1), right.movedim(-1, 1)
    lines.append(f"SSIM              {metrics.ssim(right, left):.4f}")
    value, reason = metrics.lpips(right, left)
    lines.append(f"LPIPS             {reason if value is None else f'{value:.4f}'}")
    return "\n".join(lines)


def _db(values: list[float]) -> str:
    mean = metrics.mean_db(values)
    return "identical" if math.isinf(mean) else f"{mean:.2f} dB (mean of {len(values)})"
