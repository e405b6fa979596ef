"""The layer as a torch.library operator of flat tensors: torch.compile sees one node, never inside.

Two copies of the pack may be loaded. The second finds the name taken: it uses the operator if the schema is its own,
else it registers one beside it under a numbered name.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from . import dispatch
from .formats import FORMATS
from .layer import Layer, LayerSpec, Lora

NAMESPACE = "svdquant"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # the operator lives as long as it does


def register(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """torch.ops.svdquant.<name> with this schema, registered unless a copy of the pack has done so already."""
    wanted, space = f"{NAMESPACE}::{name}{schema}", getattr(torch.ops, NAMESPACE)
    number, free = 1, name
    while hasattr(space, free):
        if str(getattr(space, free).default._schema) == wanted.replace(f"::{name}(", f"::{free}("):
            return getattr(space, free)
        number += 1
        free = f"{name}_{number}"
    LIBRARY.define(free + schema)
    # not torch.library.custom_op: its first call imports the compiler, seconds that only torch.compile needs
    LIBRARY.impl(free, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{free}", fake, lib=LIBRARY)
    return getattr(space, free)


def linear(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, compute: str, activation: str
) -> torch.Tensor:
    """The operator on a layer and x (M, K); arguments are right already."""
    spec, tensors = layer.spec, layer.tensors
    return operator(
        x,
        [tensors.get(name) for name in spec.fmt.part_names],
        bias,
        *(lora or (None, None, None)),
        spec.format,
        spec.act_unsigned,
        spec.act_rule,
        spec.act_bits,
        compute,
        activation,
    )


def _run(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
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
    names = FORMATS[format].part_names
    # kernels find an element by the shape alone; of the activation they know the stride
    parts = {name: part.contiguous() for name, part in zip(names, tensors, strict=True) if part is not None}
    n, half = parts["qweight"].shape
    rank = parts["proj_down"].shape[1] if "proj_down" in parts else 0
    spec = _spec(format, n, 2 * half, rank, tuple(act_unsigned), act_rule, act_bits)
    if bias is not None:
        bias = bias.contiguous()
    lora = None
    if lora_down is not None and lora_up is not None:
        strength = None if lora_strength is None else lora_strength.contiguous()
        lora = Lora(lora_down.contiguous(), lora_up.contiguous(), strength)
    return dispatch.run(x, Layer.known(spec, parts), bias, lora, compute, activation)


@cache
def _spec(*fields: Any) -> LayerSpec:
    return LayerSpec(*fields)


def _fake(x: torch.Tensor, tensors: Sequence[torch.Tensor | None], *rest: Any) -> torch.Tensor:
    qweight = tensors[0]
    assert qweight is not None  # the first part of every format
    return x.new_empty(x.shape[0], qweight.shape[0])


operator = register(
    "linear",
    "(Tensor x, Tensor?[] tensors, Tensor? bias, Tensor? lora_down, Tensor? lora_up, Tensor? lora_strength, "
    "str format, SymInt[] act_unsigned, str act_rule, int act_bits, str compute, str activation) -> Tensor",
    _run,
    _fake,
)
