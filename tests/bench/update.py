"""Seconds of adding events to users against Spark's own floor on the same data.

Ours: events from Delta through the vectorized function, statistics and weights of every user out, no-op write. The floor:
the same columns read, shuffled by user and sorted, no-op write. Both in turn, ``--repeats`` times.

    python tests/bench/update.py [--events 1000000 4000000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from synthetic import RANK, write_events

from mtl import gaussian, schema
from mtl.config import load_settings
from mtl.encode import Encoder
from mtl.features import Features
from mtl.forms import Form
from mtl.model import Artefact, Model
from mtl.prior import Prior
from mtl.session import open_session
from mtl.tables import Tables
from mtl.users import SharedInputs, updated_users

INPUTS = 20_000
USERS = {1_000_000: 170_000}
MORE_USERS = 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings([], [f"tables.root={folder}"])
        spark = open_session(settings.spark, "bench update")
        results = [measure(spark, Path(folder), n, arguments.repeats) for n in arguments.events]
    print(json.dumps({"k": RANK, "inputs": INPUTS, "runs": results}))


def measure(spark: SparkSession, folder: Path, n_events: int, repeats: int) -> dict:
    n_users = USERS.get(n_events, MORE_USERS)
    files = write_events(folder, n_events, n_users, INPUTS)
    tables = Tables(spark, str(folder / f"tables-{n_events}"))
    events = spark.read.parquet(str(files)).select("event_id", "user_id", "input_id", "label", "weight")
    tables.append(schema.EVENTS, events)
    partitions = spark.sparkContext.defaultParallelism
    model, inputs = random_model()

    def ours() -> DataFrame:
        rows = tables.read(schema.EVENTS)
        return updated_users(rows, tables.read(schema.USERS), None, model, inputs, partitions)

    def floor() -> DataFrame:
        rows = tables.read(schema.EVENTS).select(schema.USER_ID, schema.INPUT_ID, schema.LABEL)
        return rows.repartition(partitions, schema.USER_ID).sortWithinPartitions(schema.USER_ID)

    seconds(ours), seconds(floor)
    taken: dict[str, list[float]] = {"ours": [], "floor": []}
    for _ in range(repeats):
        taken["ours"].append(seconds(ours))
        taken["floor"].append(seconds(floor))
        print(f"{n_events} events: {taken['ours'][-1]:.2f} s, floor {taken['floor'][-1]:.2f} s", file=sys.stderr)
    return {
        "events": n_events,
        "users": n_users,
        "ours_seconds": statistics.median(taken["ours"]),
        "floor_seconds": statistics.median(taken["floor"]),
        "ratio": statistics.median(a / b for a, b in zip(taken["ours"], taken["floor"], strict=True)),
        "all": taken,
    }


def random_model(k: int = RANK) -> tuple[Model, SharedInputs]:
    """A model of rank k with random features, as a retraining would leave it."""
    random, d = np.random.default_rng(1), k + 1
    mean = random.normal(scale=0.3, size=(INPUTS, d))
    covariance = np.tile(gaussian.pack(0.05 * np.eye(d)), (INPUTS, 1))
    encoder = Encoder.fit(pd.DataFrame(index=range(1)), load_settings().encode)
    prior = Prior.start(np.eye(1), d, 0.2)
    artefact = Artefact(encoder, encoder, 0, 0, prior, prior)
    model = Model(1, schema.LIVE, Form(k), "squared", 3.5, 0.6, 0.0, 7.0, 0, 0, artefact)
    ids = pa.array(np.arange(INPUTS)).cast(pa.string())
    return model, SharedInputs(ids, Features.of(mean, covariance, 3.5))


def seconds(work) -> float:
    started = time.perf_counter()
    work().write.format("noop").mode("overwrite").save()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
