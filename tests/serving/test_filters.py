"""Attributes as tables hold them against what clients ask for, by JSON and by URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calling import INPUTS, calling

from mtl.serving.filters import matches


@pytest.mark.parametrize(
    ("value", "wanted", "is_match"),
    [
        (1994.0, 1994, True),
        (1994.0, "1994", True),
        (1994.0, "1994.0", True),
        (1994.5, "1994", False),
        (1.0, True, False),
        (1.0, "red", False),
        ("red", "red", True),
        ("red", "Red", False),
        ("1994", 1994.0, True),
        ("true", True, True),
        ("true", "true", True),
        ("false", True, False),
        (["drama", "war"], "war", True),
        (["drama", "war"], ["war", "drama"], True),
        (["drama", "war"], ["war", "crime"], False),
        ([1.0, 2.0], "2", True),
        (None, "red", False),
        ("red", None, False),
        (None, None, True),
    ],
)
def test_a_wanted_value_is_compared_as_ingest_would_store_it(value: Any, wanted: Any, is_match: bool) -> None:
    assert matches(value, wanted) is is_match


def test_top_filters_by_numbers_and_flags_and_by_what_is_stored_now(tmp_path: Path) -> None:
    with calling(tmp_path) as client:
        store = client.service.store

        def describe(commit: int, *flagged: str) -> None:
            names = [f"x{i}" for i in range(INPUTS)]
            store.write_attributes((x, {"year": 1994.0, "flag": "true" if x in flagged else "false"}) for x in names)
            store.write_versions(inputs=commit)

        def found(where: Any) -> set[str]:
            _, answer = client.ask("POST", "/v1/top", {"user": "u1", "k": INPUTS, "where": where})
            _, by_url = client.ask(
                "GET",
                "/v1/top",
                query=f"user=u1&k={INPUTS}&where=" + ",".join(f"{k}:{str(v).lower()}" for k, v in where.items()),
            )
            assert answer["scores"] == by_url["scores"]
            return {one["input"] for one in answer["scores"]}

        describe(1, "x3", "x4")
        assert len(found({"year": 1994})) == INPUTS
        assert found({"flag": True, "year": 1994}) == {"x3", "x4"}
        describe(2, "x4", "x5")
        assert found({"flag": True}) == {"x4", "x5"}
