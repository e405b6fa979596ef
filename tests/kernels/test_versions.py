"""Which Triton is enough: read from the metadata of what is installed, never by importing it."""

import importlib.util
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from svdquant_pack.kernels.backends import KernelCall, gluon, triton
from svdquant_pack.kernels.backends.triton import versions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages of these versions are installed, and nothing else that matters here."""

    def pretend(**packages: str) -> None:
        named = {name.replace("_", "-"): found for name, found in packages.items()}

        def version(name: str) -> str:
            if name not in named:
                raise PackageNotFoundError(name)
            return named[name]

        found = "a spec" if named.keys() & set(versions.PACKAGES) else None
        monkeypatch.setattr(versions, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
        forget()

    def forget() -> None:
        for cached in (versions.missing, versions.too_old, gluon.missing):
            cached.cache_clear()

    yield pretend
    forget()


def call(compute: str, capability: tuple[int, int], format: str = "int4") -> KernelCall:
    return KernelCall(
        format, torch.device("cuda"), torch.float16, compute, capability, f"sm_{capability[0]}{capability[1]}"
    )


@pytest.mark.parametrize("package", ["triton", "triton_windows", "pytorch_triton_rocm"])
@pytest.mark.parametrize(("found", "torch_here"), [("3.3.1", "2.7.1+cu128"), ("3.4.0.post21", "2.8.0")])
def test_an_older_triton_is_refused_in_one_line(installed, package, found, torch_here):
    installed(**{package: found, "torch": torch_here})
    for reason in (triton.claims(call("w16", (8, 6))), gluon.claims(call("w4a4", (8, 6)))):
        assert reason.startswith(f"needs Triton 3.5 or newer, found {found} (") and "\n" not in reason
        assert "torch 2.9 is the first with enough" in reason


@pytest.mark.parametrize("found", ["3.5.0", "3.5.1.post24", "3.6.0+git9c7b1e8d", "3.10.0", "4.0"])
def test_a_newer_one_is_not(installed, found):
    installed(triton=found, torch="2.9.1")
    assert versions.missing() is None and triton.claims(call("w16", (8, 6))) == triton.CLAIM


def test_nvfp4_on_sm_120_needs_a_newer_one(installed):
    installed(triton="3.5.1", torch="2.9.1")
    assert triton.claims(call("w4a4", (12, 0), "nvfp4")).startswith("needs Triton 3.6 or newer, found 3.5.1 (")
    assert triton.claims(call("w4a4", (10, 0), "nvfp4")) == triton.CLAIM
    installed(triton="3.6.0", torch="2.10.0")
    assert triton.claims(call("w4a4", (12, 0), "nvfp4")) == triton.CLAIM


@pytest.mark.parametrize(
    ("torch_here", "advised"),
    [
        ("2.9.1+cu128", 'on Windows: pip install "triton-windows==3.5.*"'),
        ("2.13.0", '"triton-windows==3.7.*"'),
        ("2.7.1", "torch 2.7 comes with Triton 3.3, torch 2.9 is the first with enough"),
        ("3.1.0a0+git12", "on Windows install triton-windows of the version made for 3.1.0a0+git12"),
    ],
)
def test_without_triton_the_reason_says_which_one_fits_this_torch(installed, torch_here, advised):
    installed(torch=torch_here)
    reason = triton.claims(call("w16", (8, 6)))
    assert reason.startswith("Triton is not installed (") and advised in reason and "\n" not in reason
    assert gluon.claims(call("w4a4", (8, 6))) == reason


def test_the_version_is_read_without_importing_triton():
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("p", "__init__.py")
pack = sys.modules["p"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from p.kernels.backends.triton import versions
versions.missing()
assert "triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
