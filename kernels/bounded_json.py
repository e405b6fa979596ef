"""All JSON that this pack reads, within limits: headers, markers, configurations, records, answers of a server.

Whoever writes a file decides what stands in it. So a text is refused before it is parsed where it is too long, and
after it where it nests deeper, holds more items, longer texts or more digits than anything that is meant. Nothing but
`JsonError` comes out, which names the place.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Kind = type | tuple[type, ...]


class JsonError(ValueError):
    """A text is no JSON within the limits, or not what is needed there. The message names the place."""


@dataclass(frozen=True)
class Limits:
    """The most that a text may have.

    size    bytes
    depth   objects and lists inside each other
    items   members of all objects and lists together
    digits  of a whole number
    text    characters of one string
    """

    size: int = 1 << 24
    depth: int = 64
    items: int = 1 << 20
    digits: int = 19
    text: int = 1 << 20


USUAL = Limits()
MARKER = Limits(size=1 << 16, depth=8, items=1 << 12, text=1 << 12)  # what describes one layer
HEADER = Limits(size=100_000_000, items=1 << 23, text=100_000_000)  # of a safetensors file: its library has this size


def read_json(text: str | bytes, where: str, limits: Limits = USUAL) -> Any:
    """The value of a JSON text; `where` names the file and key for the message.

    raises  JsonError for anything else, for NaN and infinite numbers, and beyond `limits`
    """
    if len(text) > limits.size:
        raise JsonError(f"{where} has {len(text):,} bytes of JSON, at most {limits.size:,} are read")

    def whole(digits: str) -> int:
        if len(digits.lstrip("-")) > limits.digits:
            raise JsonError(f"{where} holds a number of {len(digits)} digits, at most {limits.digits} are read")
        return int(digits)

    def real(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise JsonError(f"{where} holds the number {digits:.40}, needed a finite one")
        return number

    try:
        value = json.loads(text, parse_int=whole, parse_float=real, parse_constant=real)
    except JsonError:
        raise
    except RecursionError as error:
        raise JsonError(f"{where} is not JSON that can be read: it nests deeper than {limits.depth}") from error
    except ValueError as error:  # no JSON, or bytes that are no text
        raise JsonError(f"{where} is not JSON ({error!s:.200})") from error
    _check(value, where, limits)
    return value


def _check(value: Any, where: str, limits: Limits) -> None:
    """Depth, items and texts, level by level: no recursion of its own."""
    level, items = [value], 0
    for depth in range(limits.depth + 1):
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                below += entry.keys()
                below += entry.values()
                items += len(entry)
            elif isinstance(entry, list):
                below += entry
                items += len(entry)
            elif isinstance(entry, str) and len(entry) > limits.text:
                raise JsonError(f"{where} holds a text of {len(entry):,} characters, at most {limits.text:,} are read")
        if items > limits.items:
            raise JsonError(f"{where} holds {items:,} items or more, at most {limits.items:,} are read")
        if not below:
            return
        level = below
        if depth == limits.depth:
            raise JsonError(f"{where} nests deeper than {limits.depth}")


def read_object(
    text: str | bytes, where: str, kinds: Mapping[str, Kind] | None = None, limits: Limits = USUAL
) -> dict[str, Any]:
    """A JSON object. `kinds`: key -> the type of its value where the key is there. Raises JsonError."""
    value = read_json(text, where, limits)
    if not isinstance(value, dict):
        raise JsonError(f"{where} is a {type(value).__name__}, needed an object")
    for key, kind in (kinds or {}).items():
        if key in value and not is_kind(value[key], kind):
            raise JsonError(f"{where}: {key} is {value[key]!r:.40}, needed {kind_name(kind)}")
    return value


def is_kind(value: object, kind: Kind) -> bool:
    """Whether a value is of a type; true and false are no numbers."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return (bool in kinds) if isinstance(value, bool) else isinstance(value, kinds)


def kind_name(kind: Kind) -> str:
    return " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
