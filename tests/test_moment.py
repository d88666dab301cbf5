"""Times as people write them."""

from __future__ import annotations

import pytest

from mtl.moment import moment


@pytest.mark.parametrize(
    "text", ["2026-01-31T12:00:00Z", "2026-01-31T12:00:00", "2026-01-31T14:00:00+02:00", "2026-01-31 12:00"]
)
def test_a_time_is_in_utc_whatever_zone_it_names(text: str) -> None:
    assert moment(text).isoformat() == "2026-01-31T12:00:00+00:00"


@pytest.mark.parametrize("text", ["", "yesterday", "12:30", "Z"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Invalid isoformat"):
        moment(text)


def test_a_time_whose_year_is_none_in_utc_is_refused() -> None:
    with pytest.raises(ValueError, match="out of range"):
        moment("0001-01-01T00:00:00+01:00")
