"""What users are asked to install, looked at: its licences, and its known vulnerabilities.

    make audit
    python tests/audit.py FOLDER    of the packages that `pip install --target FOLDER` put there

The licences come from the packages themselves, the vulnerabilities from pip-audit, which asks an advisory service.
Exits with 1 for a licence that is not on the list or a vulnerability, and with 2 where the service did not answer for
every package: pip-audit by itself calls that "no known vulnerabilities".
"""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

# of these everybody may use, change and pass on what has them beside Apache-2.0, under which the pack is
ALLOWED = {
    "Apache-2.0",
    "MIT",
    "MIT-0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "0BSD",
    "ISC",
    "PSF-2.0",
    "MPL-2.0",
    "Unlicense",
}
# as packages called them before there was one way to say it
OLDER = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd license": "BSD-3-Clause",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "the unlicense (unlicense)": "Unlicense",
}


def licences(package: importlib.metadata.Distribution) -> set[str]:
    """The licences that a package names, all of them: of an expression every part counts."""
    said = package.metadata
    classifiers = [line.rpartition(" :: ")[2] for line in said.get_all("Classifier") or [] if "License ::" in line]
    texts = [said["License-Expression"]] if said["License-Expression"] else classifiers or [said["License"] or "none"]
    names = {part for text in texts for part in re.split(r"\s+(?:AND|OR)\s+|[()]", _known(text)) if part.strip()}
    return {_known(name) for name in names}


def _known(text: str) -> str:
    text = text.strip()
    return OLDER.get(text.lower(), text if len(text) < 60 else f"{text[:60]}...")


def refused(packages: Iterable[importlib.metadata.Distribution]) -> list[str]:
    """A line for every package with a licence that is not on the list."""
    found = ((package, licences(package) - ALLOWED) for package in packages)
    return [f"{package.metadata['Name']}: {', '.join(sorted(other))}" for package, other in found if other]


def vulnerabilities(folder: Path) -> tuple[list[str], str]:
    """(a line for every known one in a folder of packages, why not all of them are known or nothing)."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--path",
        str(folder),
        "--format",
        "json",
        "--progress-spinner",
        "off",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return [], (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
    found = [
        f"{package['name']} {package['version']}: {each['id']}, mended in {', '.join(each['fix_versions']) or 'none'}"
        for package in packages
        for each in package.get("vulns", [])
    ]
    skipped = [package["skip_reason"] for package in packages if "skip_reason" in package]
    return found, f"{len(skipped)} of {len(packages)} packages, the first: {skipped[0]}" if skipped else ""


def main(folder: Path) -> int:
    packages = sorted(importlib.metadata.distributions(path=[str(folder)]), key=lambda each: each.metadata["Name"])
    if not packages:
        sys.exit(f"{folder} holds no packages")
    for package in packages:
        print(f"{package.metadata['Name']:24}{package.version:16}{', '.join(sorted(licences(package)))}")
    bad = [f"LICENCE NOT ON THE LIST: {line}" for line in refused(packages)]
    print(f"licences: {len(packages)} packages, {len(bad)} not on the list")
    found, unknown = vulnerabilities(folder)
    bad += [f"VULNERABLE: {line}" for line in found]
    if found or not unknown:
        print(f"vulnerabilities: {len(found)} known")
    if unknown:
        print(f"vulnerabilities: NOT CHECKED, the advisory service gave no answer: {unknown}")
    print("\n".join(bad), end="\n" if bad else "")
    return 1 if bad else 2 if unknown else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
