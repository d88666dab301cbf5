"""The status page from figures, whatever there is of them."""

from __future__ import annotations

import pandas as pd
import pytest

from mtl import schema
from mtl.page import page
from mtl.progress import SEEN
from mtl.status import DELAY, cold_start


def told(progress: pd.DataFrame, **more: object) -> dict:
    return {
        "at": "2026-01-01T00:00:00+00:00",
        "versions": [{"version": 1, "status": "live", "mean_loss": 0.5, "last_batch": None}],
        "offered": 200,
        "quarantined": 0,
        "reasons": {},
        "cold_start": cold_start(progress).to_dict("records"),
        "tables": {"users": {"files": 3, "bytes": 1_500_000, "commit": 9}},
        **more,
    }


def progress(batches: int) -> pd.DataFrame:
    seen = [2.0, 1.0] + [0.0] * (len(SEEN) - 2)
    row = {
        schema.MODEL_VERSION: 1,
        schema.N_EVENTS: 3,
        schema.VALIDATED: 3,
        schema.LOSS: 6.0,
        schema.STANDARDIZED: 3.0,
        schema.COVERED: 3.0,
        schema.SEEN_N: seen,
        schema.SEEN_LOSS: [4.0, 2.0, *seen[2:]],
        schema.SEEN_AVERAGE: [4.0, 3.0, *seen[2:]],
        schema.SEEN_RIDGE: [8.0, 5.0, *seen[2:]],
        DELAY: 1.0,
    }
    times = pd.date_range("2026-01-01", periods=batches, freq="5s")
    return pd.DataFrame([{**row, schema.CREATED_AT: time} for time in times])


def test_the_cold_start_curve_is_means_by_what_users_had() -> None:
    curve = cold_start(progress(3))
    assert curve.to_dict("list") == {
        "seen": [0, 1],
        "n": [6, 3],
        "loss": [2.0, 2.0],
        "average": [2.0, 3.0],
        "ridge": [4.0, 5.0],
    }


@pytest.mark.parametrize(("batches", "images"), [(1, 5), (2, 6)])
def test_the_page_has_a_plot_of_all_that_can_be_drawn(batches: int, images: int) -> None:
    text = page(told(progress(batches)), progress(batches))
    assert text.count("<img") == images
    assert ("one batch is not enough" in text) == (batches == 1)
    assert 'src="http' not in text


def test_what_tables_hold_is_text_on_the_page_and_no_markup() -> None:
    bad = "<script>alert(1)</script>"
    text = page(told(progress(2), quarantined=50, reasons={bad: 50}), progress(2))
    assert bad not in text
    assert "50 of 200 rows offered (25.00%)" in text
