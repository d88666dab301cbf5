"""Retraining on the events since the live version alone, with what that knew as its prior."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from problems import planted
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from streaming import vacuum

from mtl import schema
from mtl.audit import audit
from mtl.blocks import EARLIER
from mtl.config import Settings, load_settings
from mtl.errors import ConfigError, StateError
from mtl.evaluate import evaluate
from mtl.ingest import ingest_events
from mtl.layout import SCHEMAS
from mtl.models import load_model, promote
from mtl.refusals import refuse_contradictions
from mtl.retrain import retrain
from mtl.schema import INPUT_ID, LABEL, USER_ID
from mtl.start import Live
from mtl.tables import Tables
from mtl.update import update

PROBLEM = planted(8, users=60, inputs=40, k=2, events=3500, noise=0.5, weighted=False)
FIRST, SECOND = 2000, 2500


def settings(*assignments: str) -> Settings:
    return load_settings([], ["tables.root=unused", "model.k=2", "train.iterations=6", *assignments])


INCREMENTAL = settings("train.incremental=true")


def file_of(folder: Path, events: np.ndarray) -> str:
    path = folder / f"{events[0]}.parquet"
    rows = {USER_ID: PROBLEM.user[events].astype(str), INPUT_ID: PROBLEM.input[events].astype(str)}
    pd.DataFrame({**rows, LABEL: PROBLEM.label[events]}).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def trained(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("incremental")
    tables = Tables(spark, str(folder / "tables"))
    tables.create(*SCHEMAS)
    ingest_events(tables, settings(), file_of(folder, np.arange(FIRST)), {})
    assert retrain(tables, INCREMENTAL)["rows"] == FIRST  # the first version has nothing to begin from
    return folder / "tables"


@pytest.fixture
def live(spark: SparkSession, trained: Path, tmp_path: Path) -> Tables:
    shutil.copytree(trained, tmp_path / "tables")
    return Tables(spark, str(tmp_path / "tables"))


def test_later_events_with_what_was_known_are_nearly_worth_all_events(live: Tables, tmp_path: Path) -> None:
    rest = file_of(tmp_path, np.arange(SECOND, len(PROBLEM)))
    first = evaluate(live, settings(), rest)["rmse"]
    ingest_events(live, settings(), file_of(tmp_path, np.arange(FIRST, SECOND)), {})
    update(live, settings())  # what the stream has added to the live version's users is not counted twice
    report = retrain(live, INCREMENTAL)
    assert (report["rows"], report["rows_trained"]) == (SECOND, SECOND - FIRST)
    objective = report["objective"]
    assert max(np.diff(objective)) <= 1e-9 * abs(objective[0])
    promote(live)
    assert audit(live, settings())["broken"] == []  # users' own sums are of all events
    incremental = evaluate(live, settings(), rest)["rmse"]
    retrain(live, settings(), promote=True)
    whole = evaluate(live, settings(), rest)["rmse"]
    assert abs(incremental - whole) < 0.01 * whole
    assert incremental < first


def test_what_earlier_events_said_of_users_is_what_the_version_has_of_them(live: Tables) -> None:
    model = load_model(live)
    features = live.read(schema.FEATURES).where(F.col(schema.MODEL_VERSION) == 1)
    first = PROBLEM.take(np.arange(FIRST))
    block = first.block(role=np.full(FIRST, EARLIER))
    told = Live(model, features).of_users(pa.array([str(i) for i in range(40)]))(block).earlier
    assert told is not None
    rows = live.read(schema.USERS).toPandas().set_index(USER_ID)
    for i, user in enumerate(block.users.to_pylist()):
        mine = rows.loc[user[1:]]
        np.testing.assert_allclose(told.precision[i], np.array(mine[schema.A]) / model.noise, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(told.information[i], np.array(mine[schema.B]) / model.noise, rtol=1e-9, atol=1e-9)


def test_what_incremental_training_cannot_do_is_refused(live: Tables, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no event since the live version's training"):
        retrain(live, INCREMENTAL)
    ingest_events(live, settings(), file_of(tmp_path, np.arange(FIRST, SECOND)), {})
    with pytest.raises(ConfigError, match="live version's form, with k = 2"):
        retrain(live, settings("train.incremental=true", "model.k=3"))
    with pytest.raises(ConfigError, match=r"does not go with model\.half_life_days"):
        retrain(live, settings("train.incremental=true", "model.half_life_days=3"))
    with pytest.raises(ConfigError, match=r"model\.loss is squared"):
        retrain(live, settings("train.incremental=true", "model.loss=poisson"))
    with pytest.raises(ConfigError, match=r'works with train\.reduction = "driver" only'):
        retrain(live, settings("train.incremental=true", "train.reduction=distributed"))
    with pytest.raises(ConfigError, match=r"set train\.lock"):
        retrain(live, settings("train.incremental=true", 'train.lock=["features"]'))
    with pytest.raises(ConfigError, match=r"train\.lock: the live version's model\.loss is squared"):
        retrain(live, settings('train.lock=["features"]', "model.loss=poisson"))
    with pytest.raises(ConfigError, match=r"train\.lock is for the live version's form, with k = 2"):
        retrain(live, settings('train.lock=["users"]', "model.k=3"))
    with pytest.raises(ConfigError, match=r"train\.lock is for the live version's form, with k = 2"):
        retrain(live, settings('train.lock=["features"]', "model.k=3"))
    with pytest.raises(ConfigError, match=r"train\.holdout chooses"):
        retrain(live, settings("train.holdout=0.1"))


def test_a_few_events_leave_the_noise_what_many_said_it_is(live: Tables, tmp_path: Path) -> None:
    before, few = load_model(live).noise, np.arange(FIRST, FIRST + 2)
    ingest_events(live, settings(), file_of(tmp_path, few), {})
    report = retrain(live, INCREMENTAL, promote=True)
    assert load_model(live).noise == pytest.approx(before, rel=0.02)
    objective = np.array(report["objective"])
    assert (np.diff(objective) <= 1e-9 * np.abs(objective[1:])).all()


@pytest.mark.parametrize("had", ["half_life_days", "contexts"])
def test_what_a_live_version_has_and_incremental_training_would_drop_is_refused(had: str) -> None:
    of: dict[str, Any] = {"loss": "squared", "half_life_days": 0.0, "contexts": [], had: [1.0]}
    live: Any = SimpleNamespace(model=SimpleNamespace(**of), batches=object())
    with pytest.raises(ConfigError, match=rf"the live version has model\.{had}"):
        refuse_contradictions(INCREMENTAL, live)


def test_a_version_of_ids_alone_can_keep_its_features(live: Tables) -> None:
    """What its inputs are is all in its features, for it has no encodings of them."""
    ids = "oracle.kind=identity"
    first = retrain(live, settings(ids), promote=True)
    kept = retrain(live, settings(ids, 'train.lock=["features"]'))
    one, other = (
        live.read(schema.FEATURES).where(F.col(schema.MODEL_VERSION) == report["model_version"]).toPandas()
        for report in (first, kept)
    )
    for name in (schema.PHI, schema.SECOND_MOMENT):
        pairs = (np.stack(rows.set_index(INPUT_ID)[name].sort_index()) for rows in (one, other))
        np.testing.assert_allclose(*pairs, atol=1e-12)


@pytest.mark.long
def test_what_a_version_was_trained_on_has_to_be_there(live: Tables, tmp_path: Path) -> None:
    ingest_events(live, settings(), file_of(tmp_path, np.arange(FIRST, SECOND)), {})
    live.delta(schema.EVENTS).optimize().executeCompaction()
    vacuum(live, schema.EVENTS)
    with pytest.raises(StateError, match="version 1 was trained on have been vacuumed: train on all"):
        retrain(live, INCREMENTAL)
