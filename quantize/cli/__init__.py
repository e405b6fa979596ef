"""The commands behind `python -m quantize`."""

import sys


def show(done: int, total: int, what: str) -> None:
    """Progress on standard error, in one line."""
    sys.stderr.write(f"\r{done}/{total} {what:<60.60}" + ("\n" if done == total else ""))
