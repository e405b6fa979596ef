"""How far two pictures or latents are apart. Pictures are (B, H, W, C) or (B, C, H, W) floats from 0 to 1."""

import math
from collections.abc import Callable

import torch

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # as the paper has them
SSIM_K = (0.01, 0.03)
LPIPS_SMALLEST = 31  # AlexNet's strides leave nothing of a smaller picture


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||"""
    size = b.double().norm().item()
    return (a.double() - b.double()).norm().item() / size if size else math.inf


def psnr(a: torch.Tensor, b: torch.Tensor, peak: float = 1.0) -> list[float]:
    """10 log10(peak^2 / mean((a - b)^2)) in dB for each element of the batch; inf where equal"""
    errors = (a.double() - b.double()).square().flatten(1).mean(1).tolist()
    return [10 * math.log10(peak * peak / error) if error else math.inf for error in errors]


def latent_psnr(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """PSNR of latents, whose peak is the largest magnitude in b."""
    return psnr(a, b, b.abs().amax().item() or 1.0)


def mean_db(values: list[float]) -> float:
    """Mean of per-image dB; inf only if all are."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean structural similarity over a batch of (B, C, H, W), Gaussian window of 11 and sigma 1.5.

    Source: Wang et al., Image Quality Assessment, IEEE TIP 13(4), 2004; peak 1.
    """
    size = min(SSIM_WINDOW, a.shape[-1], a.shape[-2])
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(places**2) / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    channels = a.shape[1]
    window = torch.outer(line, line).expand(channels, 1, size, size)

    def blurred(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, window, groups=channels)

    a, b = a.double(), b.double()
    c1, c2 = (k * k for k in SSIM_K)
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    cov = blurred(a * b) - mean_a * mean_b
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean().item()


def lpips(a: torch.Tensor, b: torch.Tensor) -> tuple[float | None, str]:
    """(mean LPIPS with AlexNet, "") or (None, why not). Never downloads: the weights have to be there already."""
    if min(a.shape[-2:]) < LPIPS_SMALLEST:
        return (
            None,
            f"not measured: pictures have {a.shape[-1]} x {a.shape[-2]} pixels, needed {LPIPS_SMALLEST} each way",
        )
    try:
        measure = _lpips_network()
    except ModuleNotFoundError as error:
        return None, f"not measured: {error.name} is not installed (`pip install torchmetrics torchvision`)"
    except (ImportError, OSError, RuntimeError) as error:  # torchvision raises RuntimeError beside another torch
        return None, f"not measured: {error}"
    values = [measure(2 * x[None].float() - 1, 2 * y[None].float() - 1) for x, y in zip(a, b, strict=True)]
    return sum(values) / len(values), ""


def _lpips_network() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Raises ImportError without torchmetrics and torchvision, OSError without AlexNet's weights."""
    from pathlib import Path

    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if not weights.is_file():
        raise OSError(f"AlexNet's weights are not in {weights.parent.name}/{weights.name} of the torch hub folder")
    network = LearnedPerceptualImagePatchSimilarity("alex")
    return lambda a, b: network(a, b).item()
