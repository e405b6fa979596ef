"""How often a layer reads its activation: by element in Triton's interpreter, by product in torch."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from svdquant_pack.kernels.layer import Lora
from svdquant_pack.tests.kernels.layers import random_layer, settings_for

triton_layers = pytest.importorskip("svdquant_pack.kernels.backends.triton.layers")
interpreter = pytest.importorskip("triton.runtime.interpreter")
K = 256


class Products(TorchDispatchMode):
    """Counts torch's products with `x` as a whole."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x, self.count = x, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            same = (each.data_ptr() == self.x.data_ptr() for each in arguments if isinstance(each, torch.Tensor))
            self.count += any(same)
        return function(*arguments, **(keywords or {}))


@contextlib.contextmanager
def reads_of(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """`elements` of x that kernels load inside the block, and `products` of it that torch computes"""
    found = SimpleNamespace(elements=0, products=0)
    load, first = interpreter.InterpreterBuilder.create_masked_load, x.data_ptr()

    def counted(self, pointers, mask, *rest):
        inside = (pointers.data >= first) & (pointers.data < first + x.nbytes)
        found.elements += int(np.count_nonzero(inside & mask.data))
        return load(self, pointers, mask, *rest)

    with monkeypatch.context() as patch, Products(x) as products:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counted)
        yield found
    found.products = products.count


def reads(format: str, compute: str, rows: int, lora_rank: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, int]:
    """(loads of an element of x by kernels, products of it by torch) in a layer of rank 32"""
    layer, x = random_layer(format, rank=32, dtype=torch.bfloat16), torch.randn(45, K).bfloat16()
    lora = Lora(*(torch.randn(n, lora_rank).bfloat16() for n in (K, 96)), torch.ones(-(-lora_rank // 16)))
    with settings_for(rows), reads_of(x, monkeypatch) as found:
        like = x, layer, None, lora if lora_rank else None
        triton_layers.prepare(*like, compute, "")(*like)
    return found.elements / x.numel(), found.products


# of rows quantized as a whole the second reading finds them in the cache: the scale is known after the first
IN_PASS = {("int4", "w4a4"): 1, ("int4", "w4a8"): 1, ("nvfp4", "w4a4"): 1, ("int4", "w4a8-jit"): 2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts loads of the interpreter")
@pytest.mark.parametrize("mode", IN_PASS, ids=" ".join)
@pytest.mark.parametrize(("lora_rank", "products"), [(0, 0), (16, 0), (32, 0), (96, 0), (112, 1)])
def test_of_many_rows_a_lora_reads_no_activation_again(mode, lora_rank, products, monkeypatch):
    """Up to the 128 columns that fit beside the codes; the columns of a wider one are torch's product."""
    assert reads(*mode, 4096, lora_rank, monkeypatch) == (IN_PASS[mode], products)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts loads of the interpreter")
@pytest.mark.parametrize("mode", IN_PASS, ids=" ".join)
@pytest.mark.parametrize(("lora_rank", "blocks"), [(0, 1), (16, 2), (32, 2), (96, 4)])
def test_of_few_rows_each_32_columns_read_it_in_the_same_launch(mode, lora_rank, blocks, monkeypatch):
    """Few rows are in the cache, and one launch takes less than three."""
    assert reads(*mode, 45, lora_rank, monkeypatch) == (IN_PASS[mode] + blocks, 0)
