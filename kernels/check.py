"""What the public operations refuse, each with what came and what was needed."""

from collections.abc import Sequence
from typing import Any

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ACTIVATIONS = ("", "gelu", "silu")
GROUPS = {"nvfp4": 16, "int8_row": 16, "fp8_row": 16}  # 64 elsewhere


def one_of(name: str, found: Any, known: Sequence[Any]) -> None:
    if found not in known:
        raise ValueError(f"{name} is {found!r}, known are {', '.join(map(repr, known))}")


def same_device(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"x is on {x.device} and {name} on {tensor.device}: move one of them")


def activation_input(x: torch.Tensor, k: int, what: str) -> None:
    """x is (..., K) in a floating dtype"""
    if x.dtype not in FLOATS:
        raise ValueError(f"x has dtype {x.dtype}, needed one of {', '.join(map(str, FLOATS))}")
    if x.shape[-1:] != (k,):
        raise ValueError(f"x has shape {tuple(x.shape)}, {what} needs (..., {k})")


def matrix_input(x: torch.Tensor, codes: str, act_unsigned: tuple[int, int]) -> None:
    """x is (M, K), K and the unsigned channels are whole groups of the codes"""
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, needed (M, K)")
    activation_input(x, x.shape[1], "the operation")
    group = GROUPS.get(codes, 64)
    if x.shape[1] % group:
        raise ValueError(f"K={x.shape[1]} is not a multiple of the {codes} group of {group} input channels")
    start, stop = act_unsigned
    if not 0 <= start <= stop <= x.shape[1] or start % group or stop % group:
        raise ValueError(f"unsigned channels {start}:{stop} must be whole groups of {group} within K={x.shape[1]}")
    if codes == "nvfp4" and start != stop:
        raise ValueError(f"unsigned channels {start}:{stop} are not defined for nvfp4 codes, they have a sign bit")


def vector(name: str, found: torch.Tensor | None, size: int, x: torch.Tensor) -> None:
    if found is None:
        return
    if found.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(found.shape)}, needed ({size},)")
    same_device(name, found, x)


def matrix(name: str, found: torch.Tensor | None, shape: tuple[int | None, int | None], x: torch.Tensor) -> None:
    """`found` is (rows, columns) or None; None in `shape` stands for any number"""
    if found is None:
        return
    fits = found.dim() == 2 and all(
        wanted is None or size == wanted for size, wanted in zip(found.shape, shape, strict=True)
    )
    if not fits:
        needed = ", ".join("R" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(found.shape)}, needed ({needed})")
    same_device(name, found, x)


def lora(
    factors: tuple[torch.Tensor, torch.Tensor], strength: torch.Tensor | None, k: int, n: int, x: torch.Tensor
) -> None:
    down, up = factors
    if down.shape[0] != k or up.shape[0] != n or down.shape[1:] != up.shape[1:]:
        raise ValueError(
            f"LoRA factors {tuple(down.shape)} and {tuple(up.shape)} do not fit, needed ({k}, R) and ({n}, R)"
        )
    same_device("the LoRA", down, x)
    same_device("the LoRA", up, x)
    vector("lora_strength", strength, -(-down.shape[1] // 16), x)


def codes_and_weight(qact: torch.Tensor, weight: torch.Tensor, ratio: int | None) -> None:
    """qact is (M, ratio * columns of weight); any of 1 and 2 if ratio is None"""
    ratios = (1, 2) if ratio is None else (ratio,)
    if qact.dim() != 2 or weight.dim() != 2 or qact.shape[1] not in [r * weight.shape[1] for r in ratios]:
        needed = " or ".join(f"(M, {r * weight.shape[1]})" for r in ratios)
        raise ValueError(f"activation {tuple(qact.shape)} does not fit weight {tuple(weight.shape)}, needed {needed}")
    same_device("the weight", weight, qact)


def branch(
    branch_act: torch.Tensor | None, proj_up: torch.Tensor | None, bias: torch.Tensor | None, m: int, n: int,
    x: torch.Tensor,
) -> None:  # fmt: skip
    if (branch_act is None) != (proj_up is None):
        raise ValueError("branch_act and proj_up belong together, one of them is missing")
    if branch_act is not None:
        matrix("branch_act", branch_act, (m, None), x)
        matrix("proj_up", proj_up, (n, branch_act.shape[1]), x)
    vector("bias", bias, n, x)
