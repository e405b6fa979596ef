"""The layer as torch.library operators of flat tensors: torch.compile sees one node, never inside.

`operator` has the gradients of gradients.py. Where none is wanted its twin without them runs: on the way through
autograd torch looks at every argument, which takes longer than all else that happens before a kernel starts.

Two copies of the pack may be loaded, of two versions and with two sets of formats. They share no operator: a name ends
in the version and a stamp of the folder, the same in every process, so that graphs compiled in one serve the next.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import dispatch, gradients
from .formats import FORMATS
from .layer import Layer, LayerSpec, Lora

VERSION = "0.1.0"  # of the pack, as in pyproject.toml, which importing does not read
NAMESPACE = "svdquant"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # the operators live as long as it does
SCHEMA = (
    "(Tensor x, Tensor?[] tensors, Tensor? bias, Tensor? lora_down, Tensor? lora_up, Tensor? lora_strength, "
    "str format, SymInt[] act_unsigned, str act_rule, int act_bits, str compute, str activation) -> Tensor"
)

Parts = Sequence[torch.Tensor | None]
"""The tensors of a layer as its format's part_names lists them; `format` beside them says "int4", "int4 fragments" """


def stamped(name: str) -> str:
    """<name>_<version>_<stamp of this folder>, and a number where that is taken: the folder was imported twice."""
    stamp = hashlib.sha256(str(Path(__file__).resolve().parent).encode(errors="surrogateescape")).hexdigest()[:8]
    wanted = f"{name}_{VERSION.replace('.', '_')}_{stamp}"
    free, number = wanted, 1
    while hasattr(getattr(torch.ops, NAMESPACE), free):
        number += 1
        free = f"{wanted}_{number}"
    return free


def register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """torch.ops.svdquant.<stamped name> with this schema."""
    name = stamped(name)
    LIBRARY.define(name + schema)
    # not torch.library.custom_op: its first call imports the compiler, seconds that only torch.compile needs
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name)


def linear(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, compute: str, activation: str
) -> torch.Tensor:
    """The operator on a layer and x (M, K); arguments are right already. What it would do, where nobody looks on."""
    if not torch.is_grad_enabled() and not watched(x):
        return dispatch.run(x, layer.contiguous(), _contiguous(bias), _contiguous_lora(lora), compute, activation)
    spec, tensors = layer.spec, layer.tensors
    parts = [tensors.get(name) for name in spec.fmt.part_names]
    run = operator if torch.is_grad_enabled() and _wants_gradient(x, layer, bias, lora) else plain_operator
    return run(
        x,
        parts,
        bias,
        *(lora or (None, None, None)),
        f"{spec.format} {layer.order}".rstrip(),
        spec.act_unsigned,
        spec.act_rule,
        spec.act_bits,
        compute,
        activation,
    )


def _questions() -> tuple[Callable[[], Any], ...]:
    """Whether there is a mode, a transform, a tracer, a profiler: of torch, which has no public names for them"""
    torch_c = torch._C
    names = ("_len_torch_dispatch_stack", "_is_torch_function_mode_enabled", "_get_tracing_state")
    try:
        inside = torch_c._functorch.peek_interpreter_stack, torch_c._autograd._profiler_enabled
        return *(getattr(torch_c, name) for name in names), *inside
    except AttributeError:
        return (lambda: True,)  # a torch that cannot be asked


QUESTIONS = _questions()


def watched(x: torch.Tensor) -> bool:
    """Whether someone would miss the operator: a compiler, one of QUESTIONS, or a tensor of another kind

    An operator of twelve arguments that is written in Python takes longer to reach than torch takes for a layer.
    """
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or x.is_meta:
        return True
    for ask in QUESTIONS:  # noqa: SIM110 (any() takes three times as long)
        if ask():
            return True
    return False


def _wants_gradient(x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> bool:
    for name, part in layer.tensors.items():
        if part.requires_grad:
            raise ValueError(
                f"{name} of {layer.spec.where} requires a gradient, and a 4-bit layer's own tensors have none: call "
                "requires_grad_(False) on it and train a LoRA beside the layer"
            )
    if x.requires_grad or (bias is not None and bias.requires_grad):
        return True
    return lora is not None and any(tensor is not None and tensor.requires_grad for tensor in lora)


def _run(
    x: torch.Tensor,
    tensors: Parts,
    bias: torch.Tensor | None,
    lora_down: torch.Tensor | None,
    lora_up: torch.Tensor | None,
    lora_strength: torch.Tensor | None,
    format: str,
    act_unsigned: Sequence[int],
    act_rule: str,
    act_bits: int,
    compute: str,
    activation: str,
) -> torch.Tensor:
    layer = _layer(tensors, format, tuple(act_unsigned), act_rule, act_bits)
    lora = None if lora_down is None or lora_up is None else Lora(lora_down, lora_up, lora_strength)
    return dispatch.run(x, layer, _contiguous(bias), _contiguous_lora(lora), compute, activation)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _contiguous_lora(lora: Lora | None) -> Lora | None:
    return None if lora is None else Lora(lora.down.contiguous(), lora.up.contiguous(), _contiguous(lora.strength))


def _layer(tensors: Parts, format: str, *settings: Any) -> Layer:
    format, _, order = format.partition(" ")
    fmt = FORMATS[format]
    # kernels find an element by the shape alone; of the activation and of what may lie by column they know the strides
    parts = {
        name: part if name in fmt.by_column else part.contiguous()
        for name, part in zip(fmt.part_names, tensors, strict=True)
        if part is not None
    }
    n, half = parts["qweight"].shape
    rank = parts["proj_down"].shape[1] if "proj_down" in parts else 0
    return Layer.known(_spec(format, n, 2 * half, rank, *settings), parts, order)


@cache
def _spec(*fields: Any) -> LayerSpec:
    return LayerSpec(*fields)


def _fake(x: torch.Tensor, tensors: Parts, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], _shape(tensors)[0])


def _shape(tensors: Parts) -> tuple[int, int]:
    """(N, K)"""
    qweight = tensors[0]
    assert qweight is not None  # the first part of every format
    return qweight.shape[0], 2 * qweight.shape[1]


plain_operator = register("linear_without_gradient", SCHEMA, _run, _fake)
operator = register("linear", SCHEMA, _run, _fake)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, tensors, bias, *lora = inputs[:6]
    ctx.settings = inputs[6:]
    saved = [x, bias, *lora, *tensors]
    # torch saves no tensor that was made in inference mode, as a server's models are
    ctx.inference = {i: tensor for i, tensor in enumerate(saved) if tensor is not None and tensor.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.inference else tensor for i, tensor in enumerate(saved)))


def _saved(ctx: Any) -> list[Any]:
    saved = list(ctx.saved_tensors)
    for i, tensor in ctx.inference.items():
        saved[i] = tensor.clone() if torch.is_grad_enabled() else tensor  # where it may be saved once more
    return saved


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    x, bias, down, up, strength, *tensors = _saved(ctx)
    format, *settings, activation = ctx.settings
    dz, dx = dy, None
    of_lora: list[gradients.Gradient] = [None, None, None]
    if activation:
        z = operator(x, tensors, bias, down, up, strength, format, *settings, "")
        dz = gradients.through_activation(dy, z, activation)
    if ctx.needs_input_grad[0]:
        dx = times_weight(dz, tensors, format, False)
    if down is not None and up is not None:
        part, *of_lora = gradients.of_lora(x, dz, Lora(down, up, strength))
        dx = None if dx is None else dx + part
    of_bias = None if bias is None else dz.to(gradients.wide_dtype(dz)).sum(0).to(bias.dtype)
    return dx, _nothing(tensors), of_bias, *of_lora, *[None] * len(ctx.settings)


def _times_weight(z: torch.Tensor, tensors: Parts, format: str, transposed: bool) -> torch.Tensor:
    return gradients.times_weight(z, _layer(tensors, format), transposed)


def _times_weight_fake(z: torch.Tensor, tensors: Parts, format: str, transposed: bool) -> torch.Tensor:
    return z.new_empty(z.shape[0], _shape(tensors)[0 if transposed else 1])


# an operator, as decoding cannot be traced: it looks at the numbers
times_weight = register(
    "times_weight",
    "(Tensor z, Tensor?[] tensors, str format, bool transposed) -> Tensor",
    _times_weight,
    _times_weight_fake,
)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, tensors, ctx.format, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _times_weight_backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    return times_weight(dy, tensors, ctx.format, not ctx.transposed), _nothing(tensors), None, None


def _nothing(tensors: Parts) -> list[None] | None:
    """No gradient: torch counts a list of tensors by its elements, one with a None among them as one argument."""
    return None if any(part is None for part in tensors) else [None] * len(tensors)


torch.library.register_autograd(operator.default.name(), _backward, setup_context=_keep, lib=LIBRARY)
torch.library.register_autograd(
    times_weight.default.name(), _times_weight_backward, setup_context=_keep_weight, lib=LIBRARY
)
