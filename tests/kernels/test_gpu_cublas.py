"""torch._scaled_mm's NVFP4 and fp8 on a real GPU, against the reference; and a measurement with the real clock."""

import pytest
import torch

from svdquant_pack.kernels import LayerSpec, rivals
from svdquant_pack.kernels.backends import KernelCall, cublas
from svdquant_pack.kernels.dispatch import arch_of
from svdquant_pack.kernels.self_test import TOLERANCE, self_test

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize(("format", "compute"), [("nvfp4", "w4a4"), ("nvfp4", "fp8"), ("int4", "fp8")])
def test_the_layer_is_the_references(format, compute, monkeypatch):
    monkeypatch.setattr(cublas.versions, "missing", lambda: "as if there were no Triton")
    device = torch.device("cuda", torch.cuda.current_device())
    arch, capability = arch_of(device)
    call = KernelCall(format, device, torch.bfloat16, compute, capability, arch, asked=False, measured=True)
    claim = cublas.claims(call)
    if isinstance(claim, str):
        pytest.skip(claim)
    assert self_test(cublas.BACKEND, call) is None


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_all_ways_of_a_layer_are_right_and_timed(format):
    device = torch.device("cuda", torch.cuda.current_device())
    found = rivals.compare(LayerSpec(format, 3072, 3072, 32), device, rivals.dtype_on(device))
    assert all(0 < each.seconds < 1 and each.error <= TOLERANCE for each in found.timed), found
    assert found.chosen == found.tabled or found.chosen.seconds < rivals.BETTER * found.tabled.seconds
