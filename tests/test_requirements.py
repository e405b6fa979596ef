"""What the pack asks of pip: nothing that replaces the torch or the Triton of the ComfyUI it is put into."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from svdquant_pack.kernels.backends.triton.versions import BROUGHT_BY, PACKAGES

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
STATED = re.compile(r"^([A-Za-z0-9_.-]+)\s*(?:>=|==)\s*([0-9.]+)", re.MULTILINE)
# wheels whose pins are known exactly: the oldest that is supported, the one whose Triton was replaced, the newest
TORCH = {"2.7.1": "3.3.1", "2.9.1": "3.5.1", "2.15.0": "3.9.0"}


def stated(*lines: str) -> dict[str, str]:
    """{package: version} of requirement lines."""
    return dict(match.groups() for match in STATED.finditer("\n".join(lines)))


def list_of(key: str) -> dict[str, str]:
    """The packages in a list of pyproject.toml; Python 3.10 has no parser for it."""
    return stated(*re.findall(r'"([^"]+)"', re.search(rf"^{key} = \[(.*?)\]", PYPROJECT, re.MULTILINE | re.DOTALL)[1]))


def test_neither_list_names_torch_or_a_triton():
    required = stated((ROOT / "requirements.txt").read_text())
    assert required == list_of("dependencies") and len(required) == 3
    assert not {"torch", *PACKAGES} & required.keys()


def test_the_oldest_lane_runs_on_exactly_the_lowest_versions_stated():
    oldest = stated((ROOT / "tests" / "oldest.txt").read_text())
    lowest = list_of("dependencies") | list_of("standalone")
    assert oldest.keys() == lowest.keys()
    for package, version in lowest.items():
        assert oldest[package] == version or oldest[package].startswith(f"{version}."), package


def environment_with(folder: Path, **packages: tuple[str, list[str]]) -> Path:
    """A virtual environment in which `packages` {name: (version, requirements)} are installed, as far as pip can see.

    Only their metadata is there: pip resolves by nothing else, and torch's CUDA libraries have gigabytes. A requirement
    on those is left out, as is the rest of what torch asks for: none of it is a package that we name.
    """
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for name, (version, requirements) in packages.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
    return python


def would_install(python: Path, *arguments: str) -> dict[str, str]:
    """{package: version} that pip would put into the environment of `python`; skips where no index answers."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--dry-run", "--quiet"]
    command += ["--retries", "1", "--timeout", "20", "--disable-pip-version-check", "--report", "-", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode and not re.search("ResolutionImpossible|conflicting dependencies", done.stderr):
        pytest.skip(f"pip cannot resolve: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    assert done.returncode == 0, done.stderr
    items = json.loads(done.stdout)["install"]
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in items}


@pytest.mark.network
@pytest.mark.parametrize(("torch", "triton"), TORCH.items())
def test_installing_the_pack_leaves_torch_and_triton_alone(tmp_path, torch, triton):
    assert BROUGHT_BY[tuple(map(int, torch.split(".")[:2]))] == tuple(map(int, triton.split(".")[:2]))
    there = {"torch": (torch, [f"triton=={triton}"]), "triton": (triton, []), "einops": ("0.1.0", [])}
    changed = would_install(environment_with(tmp_path / "venv", **there), "-r", "requirements.txt")
    assert {"safetensors", "einops"} <= changed.keys()  # pip sees what is there: this einops is too old
    assert not [name for name in changed if name.startswith(("torch", "nvidia")) or name in PACKAGES]
