"""Sampling the demo model inside the test process."""

from pathlib import Path

import torch

from svdquant_pack.nodes.demo import SVDQuantDemoDecode, SVDQuantDemoPrompt

LORAS = Path(__file__).resolve().parents[2] / "workflows" / "models" / "loras"


def forward(patcher, seed: int = 0) -> torch.Tensor:
    """One velocity of the demo model, through the host's own load and forward."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(4, 16, 8, 8, generator=generator)
    ((context, extra),) = SVDQuantDemoPrompt().encode("0123")[0]
    device = patcher.load_device
    with torch.no_grad():
        return patcher.model.apply_model(
            latent.to(device),
            torch.full((4,), 0.7, device=device),
            c_crossattn=context.to(device),
            y=extra["pooled_output"].to(device),
            transformer_options={},
        ).cpu()


def pictures(patcher, count: int = 10, steps: int = 8, seed: int = 8) -> torch.Tensor:
    """(count, 32, 32, 3) pictures of the digits 0123456789."""
    import nodes

    positive = SVDQuantDemoPrompt().encode("0123456789")[0]
    latent = {"samples": torch.zeros(count, 16, 8, 8)}
    sampled = nodes.common_ksampler(patcher, seed, steps, 1.0, "euler", "simple", positive, positive, latent)[0]
    return SVDQuantDemoDecode().decode(sampled)[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||"""
    return ((a - b).norm() / b.norm()).item()
