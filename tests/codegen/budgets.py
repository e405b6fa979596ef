"""The stored size of every main loop, per triton version: {version: {case: {target: instructions}}}."""

import json
from pathlib import Path

PATH = Path(__file__).with_name("budgets.json")
UPDATE = "python tests/codegen/report.py --update"
TOLERANCE = 0.1  # a compiler's mood within one version; more is a change worth looking at


def load() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(PATH.read_text()) if PATH.is_file() else {}


def save(budgets: dict[str, dict[str, dict[str, int]]]) -> None:
    PATH.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")


def complaint(version: str, case: str, target: str, loop: int) -> str | None:
    """Why a main loop of `loop` instructions is not what is stored, or None."""
    stored = load().get(version, {}).get(case, {}).get(target)
    if stored is None:
        return (
            f"no budget is stored for {case} on {target} with triton {version}: run `{UPDATE}` and look at the change"
        )
    if abs(loop - stored) > TOLERANCE * stored:
        return (
            f"the main loop of {case} on {target} has {loop} instructions, stored are {stored} (triton {version}, "
            f"within {TOLERANCE:.0%}): if that is meant, run `{UPDATE}`"
        )
    return None
