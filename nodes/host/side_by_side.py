"""Bridge: run a 16-bit and a 4-bit MODEL side by side and measure how far apart they are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher

from ...quantize.measure.pictures import relative_error

KEY = "svdquant_compare"


@dataclass(frozen=True)
class Sampling:
    """What a sampler node is told."""

    positive: Any
    negative: Any
    latent: dict[str, torch.Tensor]
    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str


@dataclass
class Trajectory:
    """Every call that a sampler made of a MODEL: arguments without the host's options, and what came out."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)

    def record(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An APPLY_MODEL wrapper that writes down one call."""
        result = executor(*args, **kwargs)
        options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
        kept = {key: options[key] for key in ("cond_or_uncond", "uuids", "sigmas", "sample_sigmas") if key in options}
        arguments = tuple(_to_cpu(arg) for arg in args[:5])
        rest = {key: _to_cpu(value) for key, value in kwargs.items() if key != "transformer_options"}
        self.calls.append((arguments, rest, kept))
        self.outputs.append(result.detach().cpu())
        return result


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return [_to_cpu(item) for item in value] if isinstance(value, list) else value


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [_to_device(item, device) for item in value] if isinstance(value, list) else value


def sample(patcher: ModelPatcher, how: Sampling, trajectory: Trajectory | None = None) -> torch.Tensor:
    """The latent that the host's own sampler makes; calls are written to `trajectory`."""
    if trajectory is not None:
        patcher = patcher.clone()
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        patcher.add_wrapper_with_key(kind, KEY, trajectory.record)
    start = comfy.sample.fix_empty_latent_channels(patcher, how.latent["samples"])
    noise = comfy.sample.prepare_noise(start, how.seed, how.latent.get("batch_index"))
    return comfy.sample.sample(
        patcher,
        noise,
        how.steps,
        how.cfg,
        how.sampler,
        how.scheduler,
        how.positive,
        how.negative,
        start,
        noise_mask=how.latent.get("noise_mask"),
        seed=how.seed,
        disable_pbar=True,
    ).cpu()


def velocity_errors(patcher: ModelPatcher, trajectory: Trajectory) -> list[float]:
    """||f(x_t) - v_t|| / ||v_t|| of this MODEL at every point that the trajectory visited, one per call

    Nothing drifts: each call starts from what the 16-bit model saw. It predicts final quality best of all that is
    cheap.
    """
    comfy.model_management.load_models_gpu([patcher])
    device, errors = patcher.load_device, []
    options = patcher.model_options.get("transformer_options", {})
    for (args, kwargs, kept), exact in zip(trajectory.calls, trajectory.outputs, strict=True):
        comfy.model_management.throw_exception_if_processing_interrupted()
        moved = [_to_device(arg, device) for arg in args]
        rest = {key: _to_device(value, device) for key, value in kwargs.items()}
        with torch.no_grad():
            got = patcher.model.apply_model(*moved, {**options, **kept}, **rest)
        errors.append(relative_error(got.cpu(), exact))
    return errors
