"""A layer that is called again and again: what does not change from call to call is found out once."""

from typing import Any

import torch

from . import check, dispatch, ops
from .backends import Run
from .layer import Layer, Lora
from .modes import COMPUTES, SOME


def checked_linear(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None, compute: str, activation: str
) -> torch.Tensor:
    """svdquant_linear"""
    spec = layer.spec
    check.activation_input(x, layer)
    check.vector("bias", bias, spec.n, x)
    check.one_of("compute", compute, COMPUTES)
    check.one_of("activation", activation, check.ACTIVATIONS)
    if lora is not None:
        check.lora(lora, spec.n, spec.k, x)
    y = ops.linear(x.reshape(-1, spec.k), layer, bias, lora, compute, activation)
    return y.view(*x.shape[:-1], spec.n)


class Prepared:
    """y = svdquant_linear(x, layer, bias, lora, compute) for layers whose tensors have the same shapes and types

    For each kind of call, checks, the choice of a backend and what that backend looks up are made once. Nothing of a
    layer or a call is kept: the bytes may lie elsewhere the next time. A layer's tensors are contiguous.

        >>> from svdquant_pack.kernels import FORMATS, LayerSpec
        >>> weight = FORMATS["int4"].encode_weight(2 * torch.eye(64), torch.float32)
        >>> layer = Layer(LayerSpec("int4", n=64, k=64), weight | {"smooth_factor": torch.ones(64)})
        >>> prepared, x = Prepared("w4a4"), torch.full((1, 64), 7.0)
        >>> with torch.no_grad():
        ...     [prepared(x, layer, None, None)[0, 0].item() for call in ("first", "second")]
        [14.0, 14.0]
    """

    def __init__(self, compute: str) -> None:
        self.compute = compute
        self._plans: dict[tuple[Any, ...], tuple[int, Run]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Prepared, (self.compute,)  # a copy finds out for itself

    def __call__(self, x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, lora: Lora | None) -> torch.Tensor:
        if torch.is_grad_enabled() or ops.watched(x) or dispatch.is_by_reference():
            return checked_linear(x, layer, bias, lora, self.compute, "")
        k, shape = layer.spec.k, x.shape
        m = x.numel() // k
        key = (
            x.dtype,
            x.get_device(),
            shape[-1:],
            layer.tensors["qweight"].get_device(),
            layer.order,
            (m - 1).bit_length(),  # settings of kernels change at powers of two, and the choice of a mode at SOME
            m > SOME,
            None if bias is None else _kind(bias),
            None if lora is None else (_kind(lora[0]), _kind(lora[1]), None if lora[2] is None else _kind(lora[2])),
        )
        turned_off, run = self._plans.get(key, NEVER)
        if run is None or turned_off != dispatch.turned_off():
            y = checked_linear(x, layer, bias, lora, self.compute, "")
            if all(tensor is None or tensor.is_contiguous() for tensor in (bias, *(lora or ()))):
                rows = x.reshape(-1, k)
                self._plans[key] = dispatch.turned_off(), dispatch.prepare(rows, layer, bias, lora, self.compute)
            return y
        try:
            y = run(x if len(shape) == 2 else x.reshape(-1, k), layer, bias, lora)
        except torch.cuda.OutOfMemoryError:
            raise  # the host makes room and tries again
        except Exception:
            self._plans.clear()
            return checked_linear(x, layer, bias, lora, self.compute, "")  # it turns off what fails once more
        return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[1])


NEVER = (-1, None)


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.is_contiguous(), tensor.get_device()
