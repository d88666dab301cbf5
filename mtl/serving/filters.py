"""Which inputs have an attribute that a request asks for.

Tables hold an attribute as a number, a text or a list of either, booleans as "true" and "false" (:mod:`mtl.attributes`); a
client names it by JSON, or in a URL by text. So numbers are compared as numbers, and all else as the text that ingest makes.
"""

from __future__ import annotations

from typing import Any


def matches(value: Any, wanted: Any) -> bool:
    """Whether a stored attribute is what is wanted; a list is, that has it, and all of it where that is a list too."""
    if isinstance(wanted, list):
        return all(matches(value, one) for one in wanted)
    if isinstance(value, list):
        return any(matches(one, wanted) for one in value)
    if value is None or wanted is None:
        return value is wanted
    if isinstance(value, float):
        return value == _number(wanted)
    return value == as_ingested(wanted)


def _number(wanted: str | float | bool) -> float | None:
    try:
        return None if isinstance(wanted, bool) else float(wanted)
    except ValueError:
        return None


def as_ingested(value: str | float | bool) -> str:
    """The text that ingest makes of a value that is no number."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
