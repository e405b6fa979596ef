"""`make audit`: a licence that is not on the list is named, and an advisory service that is not there is said."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from svdquant_pack.tests import audit

ROOT = Path(__file__).resolve().parents[1]


def package(folder: Path, *lines: str) -> importlib.metadata.Distribution:
    """What pip leaves of a package: its metadata."""
    info = folder / "some-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", "Name: some", "Version: 1.0", *lines, ""]))
    (found,) = importlib.metadata.distributions(path=[str(folder)])
    return found


@pytest.mark.parametrize(
    ("lines", "licences", "bad"),
    [
        (["License-Expression: MIT"], {"MIT"}, set()),
        (["License-Expression: MPL-2.0 AND (MIT OR Apache-2.0)"], {"MPL-2.0", "MIT", "Apache-2.0"}, set()),
        (["License: Apache", "Classifier: License :: OSI Approved :: MIT License"], {"MIT"}, set()),
        (["License: Apache 2.0"], {"Apache-2.0"}, set()),
        (["License-Expression: MIT AND GPL-3.0-or-later"], {"MIT", "GPL-3.0-or-later"}, {"GPL-3.0-or-later"}),
        (["License: Proprietary"], {"Proprietary"}, {"Proprietary"}),
        ([], {"none"}, {"none"}),
    ],
)
def test_every_licence_of_a_package_counts(tmp_path, lines, licences, bad):
    found = package(tmp_path, *lines)
    assert audit.licences(found) == licences
    assert audit.refused([found]) == ([f"some: {', '.join(bad)}"] if bad else [])


@pytest.mark.parametrize("name", ["safetensors", "einops", "huggingface_hub"])
def test_what_the_pack_asks_for_has_a_licence_on_the_list(name):
    assert audit.refused([importlib.metadata.distribution(name)]) == []
    assert name in (ROOT / "requirements.txt").read_text()


CLEAN = {"name": "some", "version": "1.0", "vulns": []}
SKIPPED = {"name": "some", "skip_reason": "not found"}
VULNERABLE = CLEAN | {"vulns": [{"id": "X-1", "fix_versions": ["1.1"]}]}


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ([CLEAN], 0, "vulnerabilities: 0 known"),
        (None, 2, "NOT CHECKED, the advisory service gave no answer: no route to host"),
        (
            [SKIPPED, CLEAN],
            2,
            "NOT CHECKED, the advisory service gave no answer: 1 of 2 packages, the first: not found",
        ),
        ([VULNERABLE], 1, "VULNERABLE: some 1.0: X-1, mended in 1.1"),
    ],
    ids=["clean", "no answer", "no answer for one", "vulnerable"],
)
def test_what_the_service_says_decides_the_exit_status(tmp_path, monkeypatch, capsys, answer, status, said):
    """The service is not reached from everywhere: a stand-in for pip-audit gives each kind of answer."""
    (tmp_path / "tool").mkdir()
    text = json.dumps({"dependencies": answer})
    code = f"print({text!r})" if answer else "raise SystemExit('no route to host')"
    (tmp_path / "tool" / "pip_audit.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "tool"))
    package(tmp_path, "License-Expression: MIT")
    assert audit.main(tmp_path) == status
    assert said in capsys.readouterr().out
