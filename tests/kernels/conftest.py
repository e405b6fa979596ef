"""The Triton tests run on a GPU, or in Triton's interpreter: then in a process of their own (test_interpreter.py),

because TRITON_INTERPRET is read when a kernel is imported, and other tests compile the same kernels.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_triton_*.py"]

if INTERPRETED:
    from svdquant_pack.tests.kernels import interpreter_shim

    interpreter_shim.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and item.path.name.startswith("test_triton_"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where Triton's kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")
