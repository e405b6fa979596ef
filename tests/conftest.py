"""Load the pack as `svdquant_pack`, whatever its folder is called; mark the tests that slow.txt lists."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]  # `import nodes` is ComfyUI's
spec = importlib.util.spec_from_file_location("svdquant_pack", ROOT / "__init__.py")
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
sys.modules.setdefault(ROOT.name, sys.modules[spec.name])  # a folder that is an identifier would be imported twice

SLOW = [line for line in (ROOT / "tests" / "slow.txt").read_text().splitlines() if line and not line.startswith("#")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(tuple(SLOW)):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter) -> None:
    """What tests have counted or measured and recorded as `figures`."""
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.getreports(kind)]
    said = [text for report in reports for name, text in report.user_properties if name == "figures"]
    if said:
        terminalreporter.section("figures")
        for text in said:
            terminalreporter.write_line(text)
