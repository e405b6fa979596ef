"""The Triton tests run on a GPU, or in Triton's interpreter: then in a process of their own (test_interpreter.py),

because TRITON_INTERPRET is read when a kernel is imported, and other tests compile the same kernels.
"""

import os
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(autouse=True)
def nothing_is_left_in_new_memory() -> Iterator[None]:
    """torch.empty, new_empty and empty_like give NaN, and of integers the largest, whoever calls them.

    A kernel that forgets an element would else pass whenever an earlier result lies in the memory it is given.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def device() -> torch.device:
    """Where Triton's kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Of a user who has nothing stored: no choice of an earlier test, none left behind, on disk or not."""
    from svdquant_pack.kernels import dispatch
    from svdquant_pack.kernels.measured import known

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_tested", {})
    known.cache_clear()
    yield
    known.cache_clear()
