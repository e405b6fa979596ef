"""What the benchmark times on a GPU alone: single steps, and torch's own 8-bit products. Each has its right answer."""

import pytest
import torch

pytest.importorskip("svdquant_pack.kernels.backends.triton.launch")
from svdquant_pack.tests.bench import linear_cases


@pytest.mark.parametrize("format", ["int4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_and_vendor_products(format, dtype, device):
    case = linear_cases.Case("any", "any", format, 70, 64, 128)
    data = linear_cases.make_data(case, device, dtype)
    steps, vendor = list(linear_cases._steps(data)), list(linear_cases._vendor_ways(data))
    assert [way.stage for way in steps] == ["quantize+down", "quantize+down", "expand", "product"]
    assert [way.mode for way in vendor][:1] == ["_int_mm"]
    for way in steps + vendor:
        y = linear_cases.checked_rows(way.run())
        error = linear_cases.error_of(y, way.wanted())
        assert error <= linear_cases.TOLERANCE, f"{way.mode} {way.stage} {error}"
        assert linear_cases.error_of(-y, way.wanted()) > linear_cases.TOLERANCE


def test_rows_with_outliers_are_no_fault_of_a_product(device):
    """Long rows of an activation that is not smoothed lose more than the tolerance in int8: all products share that."""
    data = linear_cases.make_data(linear_cases.Case("any", "any", "int4", 70, 64, 4096), device, torch.bfloat16)
    for way in linear_cases._vendor_ways(data):
        assert linear_cases.error_of(linear_cases.checked_rows(way.run()), way.wanted()) <= linear_cases.TOLERANCE
