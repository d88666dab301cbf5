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
    return value == _text(wanted)


def _number(wanted: str | float | bool) -> float | None:
    try:
        return None if isinstance(wanted, bool) else float(wanted)
    except ValueError:
        return None


def _text(wanted: str | float | bool) -> str:
    if isinstance(wanted, bool):
        return "true" if wanted else "false"
    return str(int(wanted)) if isinstance(wanted, float) and wanted.is_integer() else str(wanted)
