"""Past predictions rebuilt from the tables as they were."""

from __future__ import annotations

import itertools
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import functions as F
from streaming import TRAINED, append, rows, settings, vacuum

from mtl import models, schema
from mtl.care import compact
from mtl.errors import StateError
from mtl.explain import Past, explain
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import INPUT_ID, USER_ID
from mtl.score import PREDICTION, STD, score
from mtl.tables import Tables
from mtl.update import update

USERS = [*(f"u{i}" for i in range(20)), "u90", "nobody", *(f"v{i}" for i in range(3))]
INPUTS = [*(f"x{i}" for i in range(12)), "unheard"]


@pytest.mark.long
def test_a_thousand_logged_predictions_are_rebuilt_to_the_last_bit(live: Tables) -> None:
    pairs = live.spark.createDataFrame(list(itertools.product(USERS, INPUTS)), f"{USER_ID} string, {INPUT_ID} string")
    logged = {}
    for moment in range(4):
        append(live, rows(np.arange(TRAINED + 30 * moment, TRAINED + 30 * (moment + 1)), users="uv"[moment % 2]))
        update(live, settings())
        if moment == 2:
            retrain(live, settings("model.k=1"), promote=True)
        found = answers(score(live, load_model(live), pairs))
        time.sleep(0.1)  # commits have milliseconds
        logged[datetime.now(timezone.utc)] = found
        time.sleep(0.1)
    update(live, settings())
    models.rollback(live)
    assert sum(map(len, logged.values())) >= 1000
    for at, found in logged.items():
        past = Past.of(live, at)
        assert answers(past.score(pairs)) == found
    assert len({tuple(found.values()) for found in logged.values()}) == len(logged)

    at = list(logged)[1]
    one = explain(live, "u3", "x2", at)
    assert (one[PREDICTION], one[STD]) == logged[at]["u3", "x2"]
    assert sum(addend["value"] for addend in one["addends"]) == pytest.approx(one[PREDICTION])
    assert all(
        part["value"] == pytest.approx(part["from_attributes"] + part["from_residual"])
        for part in one["addends"]
        if part["of"] != "intercept"
    )
    assert one["batches"][0][schema.ACCEPTED] == 30
    new = explain(live, "nobody", "unheard", at)
    assert (new[PREDICTION], new["user_events"], new["input_has_features"]) == (
        logged[at]["nobody", "unheard"][0],
        0,
        False,
    )


def test_before_the_first_version_there_is_nothing_to_explain(live: Tables) -> None:
    with pytest.raises(StateError, match="no model version was live at 2020"):
        explain(live, "u1", "x1", datetime(2020, 1, 1, tzinfo=timezone.utc))
    nowhere = Tables(live.spark, f"{live.root}/nowhere")
    with pytest.raises(StateError, match="no model version was live"):
        explain(nowhere, "u1", "x1", datetime.now(timezone.utc))
    assert not Path(nowhere.root).exists()


@pytest.mark.long
def test_a_log_that_begins_later_is_said_to(live: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Tables.version_at
    monkeypatch.setattr(
        Tables, "version_at", lambda self, table, at: None if table == schema.USERS else real(self, table, at)
    )
    with pytest.raises(StateError, match="the log of users begins later"):
        explain(live, "u1", "x1", datetime.now(timezone.utc))


@pytest.mark.long
def test_what_has_been_vacuumed_is_said_to_be(live: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    at = datetime.now(timezone.utc)
    time.sleep(0.1)
    append(live, rows(np.arange(TRAINED, 300)))
    update(live, settings())
    compact(live, schema.USERS, 1)
    vacuum(live, schema.USERS)
    with pytest.raises(StateError, match="has been vacuumed"):
        explain(live, "u1", "x1", at)
    assert explain(live, "u1", "x1", datetime.now(timezone.utc))["model_version"] == 1
    # Without the guard it is Spark's own error, of many lines.
    monkeypatch.setattr("mtl.tables._GONE", ())
    with pytest.raises((PySparkException, Py4JError)):
        explain(live, "u1", "x1", at)


def answers(scored) -> dict:
    columns = [F.col(name) for name in (USER_ID, INPUT_ID, PREDICTION, STD)]
    return {(user, x): (prediction, std) for user, x, prediction, std in scored.select(*columns).collect()}
