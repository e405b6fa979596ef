"""What machine code must not do, and where it still does, by how much and why."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from .cross import Compiled

RULES = {  # field of Compiled: (its limit, what is wrong beyond it)
    "narrow": (0, "global loads of fewer than 4 bytes in the main loop"),
    "early": (0, "global loads that the main loop needs before its first tensor-core instruction"),
    "resident": (2, "blocks on an SM at a time"),
    "per_element": (45, "instructions per element"),
}


@dataclass(frozen=True)
class Known:
    """Cases that may break a rule, up to `limit`, on every triton; `cases` is a pattern of "case target"."""

    rule: str
    cases: str
    limit: float
    why: str

    def covers(self, rule: str, job: tuple[str, str]) -> bool:
        return rule == self.rule and fnmatchcase(" ".join(job), self.cases)


SCALE_ROWS = "2-byte scales of rows and columns; as words of two, tried on triton 3.6, 12 to 18 loads are waited for"
KNOWN = (  # the first that covers a case counts
    Known("narrow", "gemm_w4-*-a4 *", 9, SCALE_ROWS),
    Known("early", "gemm_w4-*-a4 *", 9, SCALE_ROWS),
    Known("narrow", "gemv_w4a16-*", 24, "even and odd channels are read apart, as the nibbles of the weight come"),
    Known("early", "gemv_w4a16-*", 16, "x of one row, from the cache; twelve blocks share an SM and take turns"),
    Known("narrow", "expand_weight-*", 4, "a group's scale is read once by one thread, and nothing waits for it alone"),
    Known("narrow", "gluon-int4-*", 4, "a scale of each row, one group ahead of its use"),
    Known("resident", "gluon-int4-*-128x128 sm_80", 1, "8 warps on a tile that reads each number half as often"),
    Known("resident", "gemm_w8-*", 1, "8 warps, three stages of asynchronous copies, no wait inside a stage"),
    Known("resident", "gluon-int8-async-wide*", 1, "takes the whole shared memory for its ring of copies"),
    Known("per_element", "quantize_nvfp4-1-four-six-columns128*", 48, "two scales are tried, beside the most columns"),
)


def known(rule: str, job: tuple[str, str]) -> Known | None:
    """The first exception that covers a case"""
    return next((each for each in KNOWN if each.covers(rule, job)), None)


def breaks(rule: str, found: float, allowed: float) -> bool:
    return found < allowed if rule == "resident" else found > allowed


def complaints(job: tuple[str, str], code: Compiled) -> list[str]:
    """What is wrong with the code of one (case, target); rules that were not measured there are not broken."""
    found = []
    for rule, (plain, words) in RULES.items():
        exception = known(rule, job)
        value, allowed = getattr(code, rule), plain if exception is None else exception.limit
        if value is not None and breaks(rule, value, allowed):
            bound = "at least" if rule == "resident" else "at most"
            found.append(f"{value:g} {words}, allowed are {bound} {allowed:g}: mend the kernel, or say why in rules.py")
    return found
