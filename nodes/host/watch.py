"""Bridge: watch the inputs of a MODEL's linear layers while the user's own sampler runs it.

Uses the host's wrappers of a cloned MODEL and torch's forward hooks, which are there only while one call runs: nothing
global is patched, and every model family is watched alike.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.patcher_extension
import torch
from comfy.model_patcher import ModelPatcher

from ...kernels.formats import FORMATS
from ...quantize.calibration.file import Statistics, StatisticsError
from ...quantize.calibration.several import tokens_for
from ...quantize.calibration.tokens import ModelCall
from ...quantize.families import detect
from ...quantize.maker.plan import plan_layers
from ...quantize.recipe import WITH_BRANCH, Recipe
from .source import ModelSource

KEY = "svdquant_calibrate"
NOISE = 0.01  # relative size of what is added to a layer's output to see what the model makes of it
SENSITIVE_STEPS = 4  # of a run, spread evenly
FINEST = min(WITH_BRANCH, key=lambda name: FORMATS[name].group_size)  # the format that fits the most layers


class Collector:
    """One statistics file that grows with every sampling run of the MODELs it watches.

    sensitivity  also run the model once more per layer at four steps of each run, with noise on that layer's output
    """

    def __init__(self, statistics: Statistics, sensitivity: bool = False) -> None:
        self.statistics, self.sensitivity = statistics, sensitivity
        self.layers = {layer: entry for layer, entry in statistics.entries.items() if entry.tokens.shape[0]}
        self._generator = torch.Generator()

    @property
    def path(self) -> Path:
        return self.statistics.path

    @classmethod
    def of(
        cls, patcher: ModelPatcher, path: Path, tokens: int, disk: int, again: bool, sensitivity: bool = False
    ) -> "Collector":
        """A collector for this model that writes to `path`.

        tokens, disk  at most so many tokens per layer, and so many bytes for all of them
        again         go on with the file at `path`, if there is one, instead of starting anew
        raises        StatisticsError if that file is of another model; ValueError for a 4-bit MODEL
        """
        source = ModelSource(patcher)
        family = detect(source.infos)
        plan = plan_layers(source.infos, family, Recipe(format=FINEST))
        if not plan.inputs:
            raise StatisticsError(f"{source.name}: no linear layer of family {family.name} can become 4-bit")
        if again and path.exists():
            statistics = Statistics.open(path, writable=True)
            if statistics.widths != plan.inputs:
                raise StatisticsError(f"{path.name}: holds statistics of another model; choose another name")
            return cls(statistics, sensitivity)
        metadata = {"family": family.name, "model": source.name, "shared": plan.shared_inputs, "runs": []}
        made = Statistics.create(path, plan.inputs, tokens_for(plan.inputs, tokens, disk), metadata)
        return cls(made, sensitivity)

    def watch(self, patcher: ModelPatcher) -> ModelPatcher:
        """A clone of the MODEL that feeds this collector."""
        watched, kinds = patcher.clone(), comfy.patcher_extension.WrappersMP
        watched.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, self._outer_sample)
        watched.add_wrapper_with_key(kinds.APPLY_MODEL, KEY, self._apply_model)
        return watched

    def _outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        runs: Any = self.statistics.metadata.setdefault("runs", [])
        self._generator.manual_seed(len(runs))
        self.statistics.begin()
        result = executor(*args, **kwargs)
        sigmas = next((arg for arg in args[3:4] if isinstance(arg, torch.Tensor)), torch.zeros(1))
        self.statistics.add_run(id=uuid.uuid4().hex, steps=len(sigmas) - 1)
        return result

    def _apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        call = model_call(args, kwargs)
        model = executor.class_obj.diffusion_model
        again = self.sensitivity and _is_sensitive_step(call)
        kept, rest = handed_over(list(args) if again else []), handed_over(kwargs if again else {})
        with self._hooks(model, call):
            result = executor(*args, **kwargs)
        if again:
            self._measure(model, result, lambda: executor(*handed_over(kept), **handed_over(rest)))
        return result

    @contextmanager
    def _hooks(self, model: torch.nn.Module, call: ModelCall) -> Iterator[None]:
        def look(layer: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                if not self.layers[layer].observe(inputs[0], call, self._generator):
                    raise StatisticsError(
                        f"layer {layer!r} receives NaN or Inf at step {call.step + 1} of {call.steps}: the 16-bit "
                        "model itself fails there. Try it in bf16 or fp32 instead of fp16."
                    )

            return hook

        handles = [model.get_submodule(layer).register_forward_pre_hook(look(layer)) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _measure(self, model: torch.nn.Module, exact: torch.Tensor, again: Callable[[], torch.Tensor]) -> None:
        """sensitivity of each layer += (||dv||^2 / ||v||^2) / (||dy||^2 / ||y||^2)"""
        power = exact.float().square().sum().clamp_min(1e-30)
        for layer, entry in self.layers.items():

            def disturb(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
                size = output.float().square().mean().sqrt().to(output.dtype)
                noise = torch.randn(output.shape, generator=self._generator).to(output)
                return output + NOISE * size * noise

            handle = model.get_submodule(layer).register_forward_hook(disturb)
            try:
                moved = (again().float() - exact.float()).square().sum()
            finally:
                handle.remove()
            entry.sensitivity += torch.tensor([(moved / power).item() / NOISE**2, 1.0])


def handed_over(value: Any) -> Any:
    """The same tensors in new dicts and lists: a model takes a ControlNet's tensors out of the ones it is given."""
    if isinstance(value, dict):
        return {key: handed_over(item) for key, item in value.items()}
    return [handed_over(item) for item in value] if isinstance(value, list) else value


def model_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> ModelCall:
    """Where in the run a call of apply_model is, from what the host's sampler tells its models."""
    options, batch = kwargs.get("transformer_options") or (args[5] if len(args) > 5 else {}), len(args[0])
    halves = tuple(int(half) for half in options.get("cond_or_uncond", (0,))) or (0,)
    schedule, now = options.get("sample_sigmas"), options.get("sigmas")
    if schedule is None or now is None:
        return ModelCall(0, 1, halves, batch)
    steps = max(1, len(schedule) - 1)
    current = now.flatten()[0].to(schedule)
    # a second call within a step is at a smaller sigma: it belongs to the step that it is in
    step = int((schedule > current * (1 + 1e-5)).sum())
    return ModelCall(min(step, steps - 1), steps, halves, batch)


def _is_sensitive_step(call: ModelCall) -> bool:
    wanted = {(2 * i + 1) * call.steps // (2 * SENSITIVE_STEPS) for i in range(SENSITIVE_STEPS)}
    return call.step in wanted
