"""What both training scripts share: the host's FLUX class, the digits as latents, a sampler and a judge.

An image is 32x32, one channel, -1 (ground) to 1 (stroke). `pixel_unshuffle(image, 4)` is its latent, (16, 8, 8);
no VAE is involved. The host scales FLUX latents on the way in and out, so what its KSampler returns becomes an image by
`pixel_shuffle((samples - 0.1159) * 0.3611, 4) / 2 + 0.5`. The functions here work on the model's own, unscaled side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch.nn.functional import interpolate, pad, pixel_shuffle, pixel_unshuffle

if TYPE_CHECKING:
    from collections.abc import Callable

MODELS = Path(__file__).resolve().parents[2] / "workflows" / "models"
MODEL_FILE = MODELS / "diffusion_models" / "svdquant_demo_digits.safetensors"
PROMPTS_FILE = MODELS / "svdquant_demo_prompts.safetensors"

UNET_CONFIG = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 24, 24],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}

STROKE_LEVEL = 0.15  # grey value that becomes the edge of a stroke; a little above the middle keeps small loops open
EDGE_GAIN = 3.0  # slope of the edge: about two pixels wide after enlarging four times
KEEP = 0.5  # share of each class that is kept: those nearest to its mean, which are the ones easily read
JUDGE_ROWS = 1500  # the judge learns from these rows of the data set, the remaining 297 measure it


@dataclass(frozen=True)
class Prompts:
    """What stands in for a text encoder: context (10, 2, 64) and pooled (10, 64), one row per digit."""

    context: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class Schedule:
    """Settings of one training run; `seed` covers initial weights, batches and noise."""

    steps: int
    learning_rate: float
    batch_size: int
    seed: int

    def rate(self, step: int) -> float:
        """Learning rate of a step: short linear warm-up, then half a cosine down to 1 %."""
        warm_up = min(1.0, (step + 1) / 50)
        cosine = 0.5 + 0.5 * float(np.cos(np.pi * step / self.steps))
        return self.learning_rate * warm_up * (0.01 + 0.99 * cosine)


def schedule_from_command_line(description: str, default: Schedule) -> Schedule:
    """Read `--steps`, `--lr`, `--batch` and `--seed`, with the published run as default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--lr", type=float, default=default.learning_rate)
    parser.add_argument("--batch", type=int, default=default.batch_size)
    parser.add_argument("--seed", type=int, default=default.seed)
    args = parser.parse_args()
    return Schedule(args.steps, args.lr, args.batch, args.seed)


def empty_flux() -> torch.nn.Module:
    """The host's own FLUX class in fp32 with uninitialised weights; COMFYUI_PATH names the ComfyUI folder."""
    folder = os.environ.get("COMFYUI_PATH")
    if not folder or not (Path(folder) / "comfy").is_dir():
        raise SystemExit(f"COMFYUI_PATH is {folder!r}; set it to a ComfyUI folder, the one that holds `comfy/`.")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from comfy.cli_args import args

    args.cpu = True  # before anything of the host looks for a GPU: the run has to be the same on every machine
    import comfy.ldm.flux.model
    import comfy.ops

    return comfy.ldm.flux.model.Flux(
        **UNET_CONFIG, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )


def load_flux(path: Path) -> torch.nn.Module:
    """The demo model from its file, widened to fp32."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    if config != UNET_CONFIG:
        raise ValueError(f"{path.name} was trained with another configuration: {config}")
    model = empty_flux()
    model.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
    return model.requires_grad_(False)


def load_prompts(path: Path = PROMPTS_FILE) -> Prompts:
    """Read the ten prompts."""
    tensors = load_file(path)
    return Prompts(tensors["context"], tensors["pooled"])


def digit_images() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1797 digits of scikit-learn, enlarged: images (N, 1, 32, 32) in [-1, 1] and classes (N,).

    The original is 8x8 with 17 grey values. Enlarging alone gives blurred strokes, so the grey ramp is then steepened.
    """
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = interpolate(images, size=(32, 32), mode="bicubic", align_corners=False)
    ramp = torch.tanh(EDGE_GAIN * (images.clamp(-1, 1) - STROKE_LEVEL))
    low, high = np.tanh(EDGE_GAIN * (-1 - STROKE_LEVEL)), np.tanh(EDGE_GAIN * (1 - STROKE_LEVEL))
    return (ramp - low) / (high - low) * 2 - 1, torch.tensor(data.target)


def training_set() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (N, 16, 8, 8) and classes (N,) of the most typical half of each class."""
    images, classes = digit_images()
    features = torch.from_numpy(_features(images))
    kept = []
    for digit in range(10):
        rows = (classes == digit).nonzero()[:, 0]
        distance = (features[rows] - features[rows].mean(0)).square().sum(1)
        kept.append(rows[distance.argsort(stable=True)[: int(KEEP * len(rows))]])
    rows = torch.cat(kept)
    return pixel_unshuffle(images[rows], 4), classes[rows]


def flow_batch(latents: torch.Tensor, noise_bias: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rectified flow: x = sigma * noise + (1 - sigma) * latent, velocity = noise - latent.

    latents     (B, 16, 8, 8)
    noise_bias  mean of the logit of sigma; above 0 the noisy end, where the shape is decided, is seen more often
    returns     x (B, 16, 8, 8), sigma (B,), velocity (B, 16, 8, 8)
    """
    count = len(latents)
    # one sigma from each of B equal slices of probability: a batch covers all noise levels, which steadies the loss
    quantile = (torch.arange(count) + torch.rand(count)) / count
    sigma = torch.sigmoid(torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)) * 1.2 + noise_bias)
    noise = torch.randn_like(latents)
    mix = sigma[:, None, None, None]
    return mix * noise + (1 - mix) * latents, sigma, noise - latents


@torch.no_grad()
def sample(velocity: Callable[..., torch.Tensor], prompts: Prompts, count: int, steps: int = 16) -> torch.Tensor:
    """Draw `count` images of each digit, (10 * count, 1, 32, 32) in [0, 1], by Euler steps over evenly spaced sigmas.

    The host's KSampler does the same with sampler `euler`, scheduler `simple` and cfg 1, but for its noise.
    """
    noise = torch.randn(10 * count, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    context = prompts.context.repeat_interleave(count, 0)
    pooled = prompts.pooled.repeat_interleave(count, 0)
    x = noise
    for step in range(steps):
        sigma = torch.full((len(x),), 1 - step / steps)
        x = x - velocity(x, sigma, context, pooled) / steps
    return (pixel_shuffle(x, 4) / 2 + 0.5).clamp(0, 1)


def judge(images: torch.Tensor) -> tuple[float, float]:
    """Share of images, (10 * n, 1, 32, 32) in [0, 1] in the order of `sample`, that a classifier reads as asked for.

    The second number is how often the same classifier is right about digits it has not seen, its own ceiling.
    """
    real, classes = digit_images()
    features = _features(real)
    classifier = _classifier().fit(features[:JUDGE_ROWS], classes[:JUDGE_ROWS].numpy())
    asked = np.arange(10).repeat(len(images) // 10)
    read = classifier.predict(_features(images * 2 - 1))
    ceiling = classifier.score(features[JUDGE_ROWS:], classes[JUDGE_ROWS:].numpy())
    return float((read == asked).mean()), float(ceiling)


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """-10 * log10(mean squared difference) in dB of each image, (N,), for values in [0, 1]."""
    error = ((images - reference) ** 2).flatten(1).mean(1)
    return -10 * error.clamp_min(1e-9).log10()


def save_grid(images: torch.Tensor, path: Path) -> None:
    """Write images (10 * n, 1, 32, 32) in [0, 1] as a PNG, one row per digit, every pixel doubled."""
    cells = pad(images, (1, 1, 1, 1), value=0.5)[:, 0]
    rows = cells.unflatten(0, (10, -1)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    pixels = (rows * 255).round().to(torch.uint8).repeat_interleave(2, 0).repeat_interleave(2, 1)
    Image.fromarray(pixels.numpy()).save(path)


def _features(images: torch.Tensor) -> np.ndarray:
    return interpolate(images, size=(8, 8), mode="area").flatten(1).numpy()


def _classifier() -> SVC:
    return SVC(C=10, gamma=0.06)
