"""The library in a session over Spark Connect, beside what a session with a context of its own gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from over_connect import ESTIMATOR
from problems import planted
from pyspark.sql import SparkSession
from test_cluster import SPARK_HOME, environment, free_port, kill, listens, wait_for

from mtl import OracleMTL

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = planted(11, users=30, inputs=15, k=2, events=600)
SERVER = "org.apache.spark.sql.connect.service.SparkConnectServer"
DELTA = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.shuffle.partitions": "2",
    "spark.ui.enabled": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL. Functions that it runs import mtl from the checkout, as they would from what the cluster has installed."""
    pytest.importorskip("grpc")
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    options = {**DELTA, "spark.connect.grpc.binding.port": str(port), "spark.connect.grpc.binding.address": "127.0.0.1"}
    command = [str(SPARK_HOME / "bin" / "spark-submit"), "--class", SERVER, "--master", "local[2]"]
    command += [part for key, value in options.items() for part in ("--conf", f"{key}={value}")]
    named = {**environment(), "SPARK_DAEMON_MEMORY": "1g", "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "spark-internal"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=named,
            cwd=folder,
            start_new_session=True,
        )
    try:
        wait_for(lambda: listens(port) or process.poll() is not None, 120, "the server does not listen")
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        yield f"sc://127.0.0.1:{port}"
    finally:
        kill(process)


@pytest.fixture(scope="module")
def folder(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, p = tmp_path_factory.mktemp("connect"), PROBLEM
    ratings = pd.DataFrame({"user": p.user, "item": p.input, "rating": p.label})
    ratings.to_parquet(folder / "ratings.parquet")
    items = pd.DataFrame({"item": np.arange(len(p.input_attributes)), "size": p.input_attributes[:, -1]})
    items.to_parquet(folder / "items.parquet")
    spark.createDataFrame(ratings).write.format("delta").save(str(folder / "delta"))
    return folder


@pytest.fixture(scope="module")
def said(server: str, folder: Path) -> dict[str, str]:
    command = [sys.executable, str(Path(__file__).with_name("over_connect.py")), server, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr[-6000:]}


def test_session_is_a_remote_one(said):
    assert said["remote"] is True


@pytest.mark.parametrize(
    "what",
    ["fit", "transform", "recommend", "save", "load", "fit distributed", "fit trees", "read a Delta table"],
)
def test_works(said, what):
    assert said[what] == "works", said["log"]


def test_predictions_are_those_of_a_session_of_our_own(said, spark, folder):
    ratings, items = (spark.read.parquet(f"{folder}/{name}.parquet") for name in ("ratings", "items"))
    model = OracleMTL(**ESTIMATOR).setItemAttributes(items).fit(ratings)
    key = ["user", "item", "rating"]
    ours = model.transform(ratings).toPandas().sort_values(key)
    theirs = pd.read_parquet(folder / "predictions.parquet").sort_values(key)
    np.testing.assert_allclose(theirs[["prediction", "std"]], ours[["prediction", "std"]], rtol=1e-9)


def test_what_does_not_work_is_what_the_readme_says(said):
    """Delta's Python calls need its plugin in the server, pyspark.ml's overwrite() the JVM: once they have it, say so."""
    assert "No handler found for extension" in said["create tables"]
    assert "JVM" in said["overwrite"]
