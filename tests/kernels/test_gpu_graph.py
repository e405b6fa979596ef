"""A layer step in a CUDA graph: captured after one call, replayed on other numbers."""

import pytest
import torch

from svdquant_pack.kernels import FORMATS, Lora, Prepared, computes_of
from svdquant_pack.kernels.layer import RANK_TILE
from svdquant_pack.tests.kernels.layers import random_layer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
N, K = 96, 256


@pytest.mark.parametrize("rows", [5, 333, 1024])
@pytest.mark.parametrize(("format", "compute"), [(name, how) for name in FORMATS for how in computes_of(name)])
def test_a_captured_layer_follows_its_inputs(format, compute, rows):
    layer = random_layer(format, N, K).to("cuda")
    x, bias = torch.randn(rows, K, device="cuda").bfloat16(), torch.randn(N, device="cuda").bfloat16()
    lora = None
    if layer.spec.fmt.low_rank:
        factors = (torch.randn(size, RANK_TILE, device="cuda").bfloat16() / 16 for size in (K, N))
        lora = Lora(*factors, torch.ones(1, device="cuda"))
    prepared, graph = Prepared(compute), torch.cuda.CUDAGraph()
    with torch.inference_mode():
        try:
            prepared(x, layer, bias, lora)
        except ValueError as error:
            pytest.skip(str(error))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            prepared(x, layer, bias, lora)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            y = prepared(x, layer, bias, lora)
        for strength in (0.0, 1.0, 0.8):
            x.normal_()
            if lora is not None:
                lora.strength.fill_(strength)
            graph.replay()
            torch.testing.assert_close(y, prepared(x, layer, bias, lora), rtol=0, atol=0)
