"""Times as people write them."""

from __future__ import annotations

from datetime import datetime, timezone


def moment(text: str) -> datetime:
    """A time by ISO 8601, in UTC, which it is where it names no zone.

    Raises:
        ValueError: it is none, or in UTC before the year 1 or after 9999.
    """
    # Python 3.10 knows no Z.
    time = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith(("Z", "z")) else text)
    try:
        return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except OverflowError as error:
        raise ValueError(f"{text}: {error}") from error
