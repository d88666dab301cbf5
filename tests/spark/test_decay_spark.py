"""Forgetting from retraining through the stream to the audit: one rule, the model version's own, in all of them."""

from __future__ import annotations

import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from problems import planted
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from mtl import schema
from mtl.audit import audit
from mtl.blocks import index_of
from mtl.config import Settings, load_settings
from mtl.errors import ConfigError, StateError
from mtl.features import from_rows
from mtl.ingest import ingest_events
from mtl.intake import ingest_stream
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import EVENT_ID, EVENT_TIME, INPUT_ID, LABEL, REFERENCE_TIME, USER_ID, USERS, WEIGHT
from mtl.tables import Tables
from mtl.update import update

PROBLEM = planted(6, users=15, inputs=10, k=2, events=400)
TRAINED = 250
HALF_LIFE = 30.0
START = datetime(2024, 1, 1, tzinfo=timezone.utc)
SECONDS = np.random.default_rng(0).integers(0, 200 * 86_400, len(PROBLEM))  # events come in no order of time


def settings(*assignments: str) -> Settings:
    common = ["tables.root=unused", "model.k=2", "train.iterations=3", "update.max_files_per_trigger=1"]
    return load_settings([], [*common, *assignments])


FORGETTING = f"model.half_life_days={HALF_LIFE}"


def rows(events: np.ndarray, loss: str = "squared") -> pd.DataFrame:
    label = PROBLEM.label[events] if loss == "squared" else (PROBLEM.label[events] > 3) * 1.0
    return pd.DataFrame(
        {
            EVENT_ID: [f"e{i}" for i in events],
            USER_ID: [f"u{i}" for i in PROBLEM.user[events]],
            INPUT_ID: [f"x{i}" for i in PROBLEM.input[events]],
            LABEL: label,
            WEIGHT: PROBLEM.weight[events],
            EVENT_TIME: [START + timedelta(seconds=int(s)) for s in SECONDS[events]],
        }
    )


def ingest(tables: Tables, folder: Path, events: pd.DataFrame, chosen: Settings) -> None:
    path = folder / f"{tables.version(schema.EVENTS)}.parquet"
    events.to_parquet(path)
    report = ingest_events(tables, chosen, str(path), {})
    assert (report.accepted, report.quarantined) == (len(events), 0)


def stored(tables: Tables, version: int) -> pd.DataFrame:
    names = (USER_ID, schema.A, schema.B, schema.W, schema.N_EVENTS, REFERENCE_TIME)
    users = tables.read(USERS).where(F.col(schema.MODEL_VERSION) == version).select(*names)
    return users.toPandas().set_index(USER_ID).sort_index()


def by_brute_force(tables: Tables, version: int) -> pd.DataFrame:
    """A and b of every user by a loop over all events."""
    model, everything = load_model(tables, version), rows(np.arange(len(PROBLEM)))
    found = tables.of_version(schema.FEATURES, model.version).toArrow()
    features, ids = from_rows(found, model.d), found[INPUT_ID].combine_chunks()
    place = dict(zip(ids.to_pylist(), index_of(ids, ids), strict=True))
    answers = {}
    for user, mine in everything.groupby(USER_ID):
        a, b = 0.0, 0.0
        for event in mine.itertuples():
            age = (mine[EVENT_TIME].max() - event.event_time) / timedelta(days=1)
            c, x = event.weight * 0.5 ** (age / HALF_LIFE), place[event.input_id]
            a = a + c * features.second_moment[x]
            b = b + c * (event.label * features.phi[x] - features.offset_phi[x])
        answers[user] = {schema.A: a, schema.B: b, schema.N_EVENTS: len(mine), REFERENCE_TIME: mine[EVENT_TIME].max()}
    return pd.DataFrame.from_dict(answers, "index").sort_index()


@pytest.mark.long
@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_training_stream_and_audit_forget_alike_and_as_the_version_says(
    spark: SparkSession, tmp_path: Path, loss: str
) -> None:
    tables, now = Tables(spark, str(tmp_path / "tables")), settings(f"model.loss={loss}")
    ingest(tables, tmp_path, rows(np.arange(TRAINED), loss), now)
    report = retrain(tables, settings(f"model.loss={loss}", FORGETTING))
    assert report["rows"] == TRAINED
    for part in np.array_split(np.arange(TRAINED, len(PROBLEM)), 3):
        ingest(tables, tmp_path, rows(part, loss), now)
    assert update(tables, now)["batches"] >= 3
    checks = audit(tables, now)
    assert checks["broken"] == []
    if loss == "squared":
        ours, theirs = stored(tables, 1), by_brute_force(tables, 1)
        for name in (schema.A, schema.B):
            np.testing.assert_allclose(np.stack(ours[name]), np.stack(theirs[name]), rtol=1e-9, atol=1e-9)
        assert (ours[schema.N_EVENTS] == theirs[schema.N_EVENTS]).all()
        times = [time.timestamp() for time in ours[REFERENCE_TIME]]
        assert times == [time.timestamp() for time in theirs[REFERENCE_TIME]]
    # The guard switched off: users that were told another half-life.
    tables.delta(schema.MODELS).update(F.lit(True), {schema.HALF_LIFE_DAYS: F.lit(2 * HALF_LIFE)})
    assert "users_equal_scratch" in audit(tables, now)["broken"]


@pytest.mark.long
def test_training_sees_aged_events_and_a_huge_half_life_changes_nothing(spark: SparkSession, tmp_path: Path) -> None:
    tables = Tables(spark, str(tmp_path / "tables"))
    ingest(tables, tmp_path, rows(np.arange(len(PROBLEM))), settings())
    versions = ["", "model.half_life_days=1e14", FORGETTING, FORGETTING]
    extra = [(), (), (), ("train.reduction=distributed",)]
    for half_life, more in zip(versions, extra, strict=True):
        retrain(tables, settings(*filter(None, [half_life]), *more))
    plain, huge, aged, distributed = (stored(tables, version) for version in (1, 2, 3, 4))
    assert plain[REFERENCE_TIME].isna().all()
    for name in (schema.A, schema.B, schema.W):
        np.testing.assert_allclose(np.stack(huge[name]), np.stack(plain[name]), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.stack(distributed[name]), np.stack(aged[name]), rtol=1e-6, atol=1e-6)
    assert np.abs(np.stack(aged[schema.W]) - np.stack(plain[schema.W])).max() > 0.01
    theirs = by_brute_force(tables, 3)
    np.testing.assert_allclose(np.stack(aged[schema.A]), np.stack(theirs[schema.A]), rtol=1e-9)


def test_without_a_time_an_event_is_refused_where_it_comes_in_and_in_training(
    spark: SparkSession, tmp_path: Path
) -> None:
    tables = Tables(spark, str(tmp_path / "tables"))
    some = rows(np.arange(20)).astype({EVENT_TIME: object})
    some.loc[:2, EVENT_TIME] = None
    some.to_csv(tmp_path / "some.csv", index=False)
    report = ingest_events(tables, settings(FORGETTING), str(tmp_path / "some.csv"), {})
    assert (report.accepted, report.quarantined) == (17, 3)
    reasons = tables.read(schema.QUARANTINE).select(schema.REASON).distinct().collect()
    assert [row[0] for row in reasons] == ["event_time is missing (model.half_life_days)"]
    assert ingest_events(tables, settings(), str(tmp_path / "some.csv"), {}).accepted == 3
    (tmp_path / "source").mkdir()
    shutil.copy(tmp_path / "some.csv", tmp_path / "source")
    streamed = ingest_stream(tables, settings(FORGETTING, f"source.path={tmp_path / 'source'}"))
    assert (streamed.duplicates, streamed.quarantined) == (17, 3)
    with pytest.raises(StateError, match=r"needs a time of every event: 3 have none, one of them of user u\d"):
        retrain(tables, settings(FORGETTING))
    with pytest.raises(ConfigError, match=r"set model\.implicit_weight = 0"):
        retrain(tables, settings(FORGETTING, "model.implicit_weight=0.1"))
