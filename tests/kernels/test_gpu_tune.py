"""Tuning with the real clock, on a real GPU."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from svdquant_pack.kernels.backends.triton import tiles
from svdquant_pack.kernels.backends.triton.tune import LayerShape, tune

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_tuning_keeps_settings_that_are_not_slower(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    tiles.tuned_here.cache_clear()
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        found, path = tune([LayerShape("awq_w4a16", 3072, 3072, 0)], device, Path.write_bytes)
        assert {each.kernel for each in found} <= {"gemv_w4a16", "expand_weight"} and path.is_file()
        for each in found:
            assert 0 < each.seconds <= each.shipped_seconds < 1
            assert tiles.settings(each.kernel, device, 1) == each.settings
    finally:
        tiles.tuned_here.cache_clear()
