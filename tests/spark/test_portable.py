"""A model version as files predicts what the tables do, in any process; and MLflow keeps both it and how it came about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from problems import planted
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from mtl import portable, schema
from mtl.config import load_settings
from mtl.errors import ConfigError
from mtl.layout import SCHEMAS
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import INPUT_ID, LABEL, USER_ID
from mtl.score import PREDICTION, STD, score
from mtl.tables import Tables

PROBLEM = planted(3, users=20, inputs=12, k=2, events=300)
FAST = ["train.iterations=3", "model.k=2", "train.partitions=2", "encode.activity=true"]


@dataclass(frozen=True)
class Saved:
    tables: Tables
    folder: Path
    asked: pd.DataFrame  # pairs of known and unknown users and inputs, not in any order
    expected: pd.DataFrame  # what the tables say of them, in this order


def filled(spark: SparkSession, root: Path) -> Tables:
    """Inputs x0 … x13 of which x12 and x13 have attributes alone, users u0 … u20 of which u20 likewise."""
    tables, p = Tables(spark, str(root)), PROBLEM
    tables.create(*SCHEMAS)
    events = pd.DataFrame({USER_ID: [f"u{u}" for u in p.user], INPUT_ID: [f"x{x}" for x in p.input], LABEL: p.label})
    rows = spark.createDataFrame(events.assign(weight=1.0, event_id=[str(i) for i in range(len(events))]))
    kinds = {field.name: field.dataType for field in SCHEMAS[schema.EVENTS]}
    empty = [F.lit(None).cast(kind).alias(name) for name, kind in kinds.items() if name not in rows.columns]
    tables.append(schema.EVENTS, rows.select("*", *empty).select(*kinds))
    random = np.random.default_rng(0)
    inputs = pd.DataFrame({INPUT_ID: [f"x{i}" for i in range(14)], "size": random.normal(size=14)})
    users = pd.DataFrame({USER_ID: [f"u{i}" for i in range(21)], "age": random.normal(size=21)})
    tables.append(schema.INPUTS, spark.createDataFrame(inputs), evolve=True)
    tables.append(schema.USER_ATTRIBUTES, spark.createDataFrame(users), evolve=True)
    return tables


@pytest.fixture(scope="module")
def saved(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("portable")
    tables = filled(spark, folder / "tables")
    retrain(tables, load_settings(assignments=FAST))
    model = load_model(tables)
    portable.save_portable(tables, model, folder / "model")
    users, inputs = [*(f"u{i}" for i in range(21)), "nobody"], [*(f"x{i}" for i in range(14)), "nothing"]
    asked = pd.DataFrame([(user, x) for user in users for x in inputs], columns=[USER_ID, INPUT_ID])
    asked = asked.sample(frac=1.0, random_state=0)
    scored = score(tables, model, spark.createDataFrame(asked)).toPandas()
    return Saved(tables, folder / "model", asked, asked.merge(scored, on=[USER_ID, INPUT_ID])[[PREDICTION, STD]])


def test_predicts_what_the_tables_do(saved):
    said = portable.load_portable(saved.folder).predict(saved.asked)
    assert said.index.equals(saved.asked.index)
    np.testing.assert_allclose(said, saved.expected, rtol=1e-12)
    # One prior for all of them would pass for unknown users only.
    assert saved.expected[PREDICTION].nunique() > 200


def test_one_row_is_predicted_as_among_many(saved):
    loaded = portable.load_portable(saved.folder)
    one = saved.asked.iloc[[17]]
    np.testing.assert_allclose(loaded.predict(one), saved.expected.iloc[[17]], rtol=1e-12)
    assert loaded.predict(saved.asked.iloc[:0]).shape == (0, 2)


def test_size_is_that_of_users_and_features(saved):
    d = 3  # k = 2 basis functions and the intercept
    assert portable.size_mb(saved.tables, load_model(saved.tables)) == pytest.approx(
        (21 + 14) * 8 * (d * (d + 1) / 2 + 2 * d) / 1e6
    )


def test_mlflow_that_is_missing_is_said_before_training(tables, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'oracle-mtl\[mlflow\]'"):
        retrain(tables, load_settings(assignments=["mlflow.tracking_uri=anywhere"]))


LOAD = """
import json, sys, pandas as pd
from mlflow import pyfunc
model = pyfunc.load_model(sys.argv[1])
said = model.predict(pd.read_parquet(sys.argv[2]))
said.to_parquet(sys.argv[3])
import mtl
from pyspark.sql import SparkSession
print(json.dumps({"mtl": mtl.__file__, "spark": SparkSession.getActiveSession() is not None}))
"""


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server keeps its runs in a database, which skinny has not
    return pytest.importorskip("mlflow")


@pytest.mark.long
def test_mlflow_has_the_run_and_its_model_predicts_in_a_clean_process(spark, saved, mlflow, tmp_path):
    store = (tmp_path / "mlruns").as_uri()
    tables = filled(spark, tmp_path / "tables")
    settings = load_settings(assignments=[*FAST, "spark.options={secret = 'key'}", f"mlflow.tracking_uri={store}"])
    report = retrain(tables, settings)
    run = mlflow.MlflowClient(store).get_run(report["mlflow_run"])
    assert run.data.params["train.iterations"] == "3"
    assert not any(name.startswith("spark.") for name in run.data.params)
    assert run.data.metrics["noise"] == report["noise"]
    history = mlflow.MlflowClient(store).get_metric_history(run.info.run_id, "objective")
    assert [point.value for point in sorted(history, key=lambda point: point.step)] == report["objective"]
    assert [file.path for file in mlflow.MlflowClient(store).list_artifacts(run.info.run_id)] == ["objective.png"]

    (logged,) = mlflow.search_logged_models(output_format="list")
    saved.asked.to_parquet(tmp_path / "asked.parquet")
    command = [sys.executable, "-c", LOAD, logged.model_uri, "asked.parquet", "said.parquet"]
    # No Java: Spark could not start there.
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store, "PATH": "/nowhere", "JAVA_HOME": "/nowhere"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    where = json.loads(done.stdout.splitlines()[-1])
    assert not where["spark"]
    assert "/code/mtl/" in where["mtl"]
    np.testing.assert_allclose(pd.read_parquet(tmp_path / "said.parquet"), saved.expected, rtol=1e-12)


@pytest.mark.long
def test_a_model_over_the_limit_is_not_logged(spark, mlflow, tmp_path):
    store = (tmp_path / "mlruns").as_uri()
    assignments = [*FAST, f"mlflow.tracking_uri={store}", "mlflow.model_limit_mb=0"]
    assert retrain(filled(spark, tmp_path / "tables"), load_settings(assignments=assignments))["mlflow_run"]
    assert mlflow.search_logged_models(output_format="list") == []


@pytest.mark.long
def test_a_version_stands_though_mlflow_fails(spark, mlflow, tmp_path):
    (tmp_path / "occupied").write_text("no folder")
    store = (tmp_path / "occupied").as_uri()
    tables = filled(spark, tmp_path / "tables")
    report = retrain(tables, load_settings(assignments=[*FAST, f"mlflow.tracking_uri={store}"]))
    assert report["mlflow_run"] is None
    assert load_model(tables).version == report["model_version"]
