"""Logistic loss from files to errors, and the audit's replay of training, batches and releases in their order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from problems import planted
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from scipy.special import expit
from sklearn import metrics

from mtl import baselines, replay, schema
from mtl.audit import _users_equal_scratch, audit
from mtl.config import Settings, load_settings
from mtl.evaluate import evaluate
from mtl.ingest import ingest_files
from mtl.layout import SCHEMAS
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import EVENT_ID, INPUT_ID, LABEL, USER_ID, WEIGHT
from mtl.score import PREDICTION, STD, score
from mtl.tables import Tables
from mtl.update import update
from mtl.users import TURN

PROBLEM = planted(4, users=20, inputs=12, k=2, events=500)
TRAINED = 300


def settings(loss: str, *assignments: str) -> Settings:
    common = ["tables.root=unused", "model.k=2", "train.iterations=3", "encode.min_category_count=1"]
    common += ["evaluate.als_ranks=[2]", "evaluate.als_regularization=[0.1]", "evaluate.als_iterations=3"]
    return load_settings([], [*common, f"model.loss={loss}", *assignments])


def rows(loss: str, events: range, input: str | None = None) -> pd.DataFrame:
    h, random = PROBLEM.expected - 3, np.random.default_rng(9)
    label = random.random(len(h)) < expit(h) if loss == "logistic" else random.poisson(np.exp(np.minimum(h, 4)))
    chosen = np.arange(events.start, events.stop)
    inputs = [f"x{i}" for i in PROBLEM.input[chosen]] if input is None else input
    frame = pd.DataFrame({EVENT_ID: [f"e{i}" for i in chosen], USER_ID: [f"u{i}" for i in PROBLEM.user[chosen]]})
    return frame.assign(**{INPUT_ID: inputs, LABEL: label[chosen] * 1.0, WEIGHT: PROBLEM.weight[chosen]})


def append(tables: Tables, events: pd.DataFrame, files: int) -> None:
    """One commit of several files."""
    names = SCHEMAS[schema.EVENTS]
    missing = [F.lit(None).cast(c.dataType).alias(c.name) for c in names if c.name not in events]
    new = tables.spark.createDataFrame(events).select("*", *missing).select(names.names)
    tables.append(schema.EVENTS, new.repartition(files, EVENT_ID))


def trained(spark: SparkSession, folder: Path, loss: str, chosen: Settings) -> Tables:
    """Tables with a live model over the first events, from files."""
    tables = Tables(spark, str(folder / "tables"))
    described = pd.DataFrame({INPUT_ID: [f"x{i}" for i in range(12)], "year": np.linspace(-1, 1, 12)})
    refused = rows(loss, range(TRAINED, TRAINED + 1)).assign(**{LABEL: 0.5})
    pd.concat([rows(loss, range(TRAINED)), refused]).to_parquet(folder / "train.parquet")
    described.to_parquet(folder / "inputs.parquet")
    report, _ = ingest_files(tables, chosen, str(folder / "train.parquet"), str(folder / "inputs.parquet"))
    assert (report.accepted, report.quarantined) == (TRAINED, 1)
    retrain(tables, chosen)
    return tables


def test_users_of_a_logistic_model_equal_a_replay(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = "logistic"
    chosen = settings(loss, "update.max_files_per_trigger=2")  # fewer than a commit has: batches end within it
    tables = trained(spark, tmp_path, loss, chosen)
    append(tables, rows(loss, range(TRAINED, 400)), files=3)
    append(tables, pd.concat([rows(loss, range(400, 420)), rows(loss, range(420, 430), "late")]), files=2)
    streamed = update(tables, chosen)
    assert (streamed["waited"], streamed["batches"]) == (10, 3)
    tables.append(schema.INPUTS, spark.createDataFrame(pd.DataFrame({INPUT_ID: ["late"], "year": [1.0]})))
    assert update(tables, chosen)["released"] == 10
    tables.delta(schema.EVENTS).optimize().executeCompaction()  # its files no longer tell the order
    append(tables, rows(loss, range(430, 450)), files=1)
    assert update(tables, chosen)["applied"] == 20

    checked = audit(tables, chosen)
    assert [name for name in checked["broken"] if name != "ingest_adds_up"] == []  # these came without ingest
    found = checked["checks"]["users_equal_scratch"]
    assert 0 < found["mean_refit_gap"] < found["refit_gap"] < 0.3
    with monkeypatch.context() as patch:
        turn = F.col(TURN)
        backwards = lambda *of: replay.in_turns(*of).withColumn(TURN, F.when(turn > 0, 99 - turn).otherwise(turn))  # noqa: E731
        patch.setattr("mtl.rebuild.in_turns", backwards)
        another_order = _users_equal_scratch(tables, load_model(tables), 1e-8)
    assert not another_order["holds"]
    assert not another_order["counts_differ"]


@pytest.mark.long
def test_errors_of_a_logistic_model_and_of_its_baselines(spark: SparkSession, tmp_path: Path) -> None:
    loss = "logistic"
    chosen = settings(loss)
    tables = trained(spark, tmp_path, loss, chosen)
    rest = rows(loss, range(450, 500))
    rest.to_parquet(tmp_path / "test.parquet")
    errors = evaluate(tables, chosen, str(tmp_path / "test.parquet"), with_baselines=True)
    scored = score(tables, load_model(tables), spark.createDataFrame(rest)).toPandas()
    y, p = scored[LABEL], scored[PREDICTION]
    np.testing.assert_allclose(scored[STD], np.sqrt(p * (1 - p)))
    assert errors["log_loss"] == pytest.approx(metrics.log_loss(y, p))
    assert errors["auc"] == pytest.approx(metrics.roc_auc_score(y, p))
    assert errors["brier"] == pytest.approx(metrics.brier_score_loss(y, p))
    assert errors["accuracy"] == metrics.accuracy_score(y, p >= 0.5)
    assert errors["ece"] == pytest.approx(calibration_error(y, p))
    assert "coverage90" not in errors
    assert sum(group["n"] * group["log_loss"] for group in errors["by_user_events"]) / 50 == pytest.approx(
        errors["log_loss"]
    )
    compared = errors["baselines"]
    assert set(compared) == {*baselines.NAMES, baselines.POOLED}
    assert compared["global_mean"]["auc"] == 0.5  # all ties
    assert all(0 < of["log_loss"] < 2 for of in compared.values())


def calibration_error(y: pd.Series, p: pd.Series) -> float:
    bins = pd.cut(p, np.linspace(0, 1, 16), right=False)
    return float((p - y).groupby(bins, observed=True).sum().abs().sum() / len(y))


def test_batches_are_told_by_the_last_file_that_they_read() -> None:
    ends = [replay.end_of(json.dumps({"reservoirVersion": v, "index": i})) for v, i in ((3, 1), (5, -1), (5, 0))]
    assert ends == [(3, 1), (5, -1), (5, 0)]
    files = [(3, 0), (3, 1), (3, 2), (4, 0), (5, 0), (5, 1)]
    assert replay.batch_of(files, ends) == [0, 0, 1, 1, 2, None]
