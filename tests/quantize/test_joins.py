"""Layers side by side are one layer, and can be taken apart again."""

import pytest
import torch

from svdquant_pack.kernels import Layer
from svdquant_pack.quantize.files.dialects.nunchaku import joins
from svdquant_pack.tests.kernels.layers import random_layer
from svdquant_pack.tests.quantize.test_layout import same_bytes


@pytest.mark.parametrize("ranks", [(16, 16), (16, 48), (0, 16)])
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_joining_and_splitting_are_inverse(format, ranks):
    smooth = random_layer(format, 128, 128, 0, dtype=torch.bfloat16)["smooth_factor"]
    rows = [
        random_layer(format, n, 128, rank, dtype=torch.bfloat16, seed=n)
        for n, rank in zip((128, 64), ranks, strict=True)
    ]
    parts = [{**layer.tensors, "smooth_factor": smooth} for layer in rows]
    joined = joins.join_rows(parts, shared_down=False)
    spec = joins.join_rows_spec([layer.spec for layer in rows], False)
    wanted = torch.cat([Layer(layer.spec, part).dense_weight() for layer, part in zip(rows, parts, strict=True)])
    assert torch.allclose(Layer(spec, joined).dense_weight(), wanted, rtol=1e-6, atol=1e-7)
    if min(ranks):
        blocks = joins.rank_blocks(joined["proj_up"], (128, 64))
        for part, back in zip(parts, joins.split_rows(joined, (128, 64), blocks), strict=True):
            assert all(same_bytes(back[name], part[name]) for name in part.keys() - {"wtscale"})
    columns = [
        random_layer(format, 64, k, rank, dtype=torch.bfloat16, seed=k)
        for k, rank in zip((128, 64), ranks, strict=True)
    ]
    for layer in columns:
        if "wtscale" in layer.tensors:
            layer.tensors["wtscale"] = layer["wtscale"].bfloat16()
    joined = joins.join_columns([layer.tensors for layer in columns])
    spec = joins.join_columns_spec([layer.spec for layer in columns])
    wanted = torch.cat([layer.dense_weight() for layer in columns], 1)
    assert torch.allclose(Layer(spec, joined).dense_weight(), wanted, rtol=1e-6, atol=1e-7)
    if min(ranks):
        for layer, back in zip(columns, joins.split_columns(joined, spec, (128, 64), torch.bfloat16), strict=True):
            assert back.keys() == layer.tensors.keys()
            assert all(same_bytes(back[name], layer[name]) for name in back)
