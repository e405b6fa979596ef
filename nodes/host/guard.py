"""Bridge: what a 4-bit model gives is made of numbers, or it is said which layer's is not, and why.

A wrapper of the host looks at the model's output, once per call. Only where it holds NaN or Inf is the call repeated,
with every layer watched: a layer whose input is finite and whose output is not is where it began. What the host's
model repairs by itself is not seen: FLUX in float16 replaces NaN and Inf behind every block.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import comfy.patcher_extension
import torch
from comfy.model_patcher import ModelPatcher

from ...kernels.dispatch import by_reference, call_of, turn_off
from ...kernels.layer import is_finite
from ...quantize.calibration.tokens import ModelCall
from .linear import SVDQuantLinear
from .watch import handed_over, model_call

log = logging.getLogger("svdquant")
KEY = "svdquant_guard"
REFERENCE, STOP = "reference", "stop"
CHOICES = (REFERENCE, STOP)
ARGUMENTS = ("x (the latent)", "t (the time)", "c_concat", "c_crossattn (the text)", "control")  # of apply_model
BF16 = "run it in bf16 or fp32 (--bf16-unet, --fp32-unet)"


class NumbersError(RuntimeError):
    """A model gave NaN or Inf, and the message says where they come from."""


@dataclass(eq=False)
class Guard:
    """Looks at every output of one MODEL and its clones.

    then  `reference` turns off the kernel that gave NaN or Inf and goes on with the output of plain torch; `stop`
          raises. What plain torch gives as well always raises: no kernel can give anything else
    """

    then: str = REFERENCE
    _said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.then not in CHOICES:
            raise ValueError(f"if_not_finite is {self.then!r}, known are {', '.join(CHOICES)}")

    def watch(self, patcher: ModelPatcher) -> None:
        patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, KEY, self.apply_model)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """An APPLY_MODEL wrapper. raises NumbersError"""
        kept, rest = handed_over(list(args)), handed_over(kwargs)
        result = executor(*args, **kwargs)
        if _is_finite(result):
            return result
        call = model_call(kept, rest)
        named = [*zip(ARGUMENTS, kept, strict=False), *((n, v) for n, v in rest.items() if n != "transformer_options")]
        bad = [name for name, value in named if not _is_finite(value)]
        if bad:
            self._warn(
                "input",
                f"the model was called with NaN or Inf in {' and '.join(bad)} at {_where(call)}, and gives NaN or Inf: "
                "they come from what stands before it in the workflow, not from its layers",
            )
            return result
        watched = _Watched(executor.class_obj.diffusion_model, self.then, call)
        with _without_trace(kept[0].device), watched.hooks():
            result = executor(*kept, **rest)
        if not _is_finite(result):
            raise NumbersError(watched.explanation())
        if not watched.mended:
            text = (
                f"the model gave NaN or Inf at {_where(call)}, and did not when the same call was repeated: a kernel, "
                "a driver or the memory is not reliable. SVDQuant Model Info names the kernels; compute = w16 may help"
            )
            if self.then == STOP:
                raise NumbersError(text)
            self._warn("unsteady", text + ". The repeated call is used")
        return result

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.warning("%s", text)


class _Watched:
    """One call of a model, every layer of which is looked at."""

    def __init__(self, model: torch.nn.Module, then: str, call: ModelCall) -> None:
        self.model, self.then, self.call = model, then, call
        self.mended: list[str] = []
        self._own: list[str] = []
        self._last = "the first layer"

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """torch's forward hooks on every layer, for as long as one call runs"""
        handles = [
            module.register_forward_hook(self._look(name))
            for name, module in self.model.named_modules()
            if isinstance(module, SVDQuantLinear) or not any(True for _ in module.children())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, name: str) -> Callable[..., torch.Tensor | None]:
        def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> torch.Tensor | None:
            if _is_finite(output):
                self._last = f"layer {name!r}"
                return None
            if not _is_finite(inputs):
                return None
            if isinstance(module, SVDQuantLinear) and module.packed is not None:
                return self._mended_output(name, module, inputs[0])
            self._own.append(
                f"the 16-bit layer {name!r} ({type(module).__name__}) gave NaN or Inf {self._of(inputs)}: it is "
                f"ComfyUI's own, and no 4-bit layer before it gave any. If the model is in float16, {BF16}; else its "
                "tensors or a LoRA of it are damaged"
            )
            return None

        return hook

    def _mended_output(self, name: str, module: SVDQuantLinear, x: torch.Tensor) -> torch.Tensor | None:
        """What the layer gives by the reference, if that is finite; the kernel that is at fault is turned off."""
        packed, rows = module.four_bit, x.numel() // module.in_features
        choice = packed.choice(x.device, x.dtype, rows)
        where = f"layer {name!r} ({packed.spec.where}) gave NaN or Inf {self._of(x)}"
        with by_reference():
            exact: torch.Tensor = module.forward(x)
            if not is_finite(exact):
                ran = f"by {choice.backend.name} {choice.compute}"
                self._own.append(f"{where} {ran}, and by plain torch: {_own_fault(module, x)}")
                return None
        if self.then == STOP:
            raise NumbersError(
                f"{where} by {choice.backend.name} {choice.compute}; plain torch gives numbers there. Set "
                f"if_not_finite of SVDQuant Load Model to {REFERENCE}, or compute to another mode; please report it "
                "with what SVDQuant Model Info says"
            )
        for form in {packed, packed.passing()}:  # a weight that is streamed in may run in another mode
            found = form.choice(x.device, x.dtype, rows)
            if found.backend.name != "reference":
                said = f"{where}; the call is repeated without it"
                turn_off(found.backend, call_of(packed.spec, x.device, x.dtype, found.compute), said)
        self.mended.append(name)
        return exact

    def _of(self, inputs: Any) -> str:
        largest = max((tensor.abs().max().item() for tensor in _tensors(inputs) if tensor.numel()), default=0)
        return f"at {_where(self.call)} from finite input (largest |x| {largest:.3g})"

    def explanation(self) -> str:
        """Why the repeated call is not finite either."""
        if not self._own:
            return (
                f"the model gave NaN or Inf at {_where(self.call)}, and none of its layers did from finite input: they "
                f"began between layers (attention, a patch of the model), after {self._last}. {BF16.capitalize()}"
            )
        more = f" ({len(self._own) - 1} more layers as well)" if len(self._own) > 1 else ""
        return self._own[0] + more


def _own_fault(module: SVDQuantLinear, x: torch.Tensor) -> str:
    """Why a layer is not finite by the reference, which is the one that runs."""
    loras = module.loras
    if loras is not None:
        module.__dict__["loras"] = None  # as set_loras does, but what is on the device stays
        try:
            if is_finite(module.forward(x)):
                return "without its LoRAs it gives numbers. One of them is damaged, or its strength far too large"
        finally:
            module.__dict__["loras"] = loras
    if x.dtype != torch.float32:
        exact = module.forward(x.float())
        if is_finite(exact):
            dtype = str(x.dtype).removeprefix("torch.")
            return (
                f"its output is {exact.abs().max().item():.3g}, beyond {dtype}, where the 16-bit model overflows as "
                f"well; {BF16}"
            )
    return "its tensors are damaged, or were when it was made. Download or make the file again"


@contextlib.contextmanager
def _without_trace(device: torch.device) -> Iterator[None]:
    """A repeated call leaves the random state as it was, and runs layer by layer where the model was compiled."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if "torch._dynamo" in sys.modules:  # a compiled graph knows nothing of new hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _where(call: ModelCall) -> str:
    return f"step {call.step + 1} of {call.steps}"


def _is_finite(value: Any) -> bool:
    """Whether every tensor of floats inside is."""
    return all(map(is_finite, _tensors(value)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of floats inside."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value.detach()
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
