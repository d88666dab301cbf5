"""Seconds of retraining against MLlib ALS: one Spark session, the same events, rank and iterations.

Ours counts everything from the events table to the fitted model: catalogue, shuffle into blocks, every pass. ``written``
adds what a retraining writes (features, all users' sums and weights, the model). Both train in turn, ``--repeats`` times.

    python tests/bench/retrain.py [--events 1000000 5000000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from memory import PeakMemory
from pyspark.ml.recommendation import ALS
from pyspark.sql import SparkSession
from synthetic import RANK, write_events

from mtl import schema
from mtl.config import load_settings
from mtl.fitting import train
from mtl.retrain import retrain
from mtl.session import open_session
from mtl.tables import Tables

USERS, INPUTS, ITERATIONS = 100_000, 20_000, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 5_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--k", type=int, default=RANK)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--without-writing", action="store_true", help="leave out the run that writes all rows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(
            [],
            [
                f"tables.root={folder}",
                f"model.k={arguments.k}",
                f"train.iterations={arguments.iterations}",
                "oracle.kind=identity",
            ],
        )
        spark = open_session(settings.spark, "bench retrain")
        results = [measure(spark, Path(folder), settings, n, arguments) for n in arguments.events]
    sizes = {"k": arguments.k, "iterations": arguments.iterations, "users": USERS, "inputs": INPUTS}
    print(json.dumps({**sizes, "runs": results}))


def measure(spark: SparkSession, folder: Path, settings, n_events: int, arguments: argparse.Namespace) -> dict:
    files = write_events(folder, n_events, USERS, INPUTS)
    tables = Tables(spark, str(folder / f"tables-{n_events}"))
    numbers = str(folder / f"numbers-{n_events}")
    rows = spark.read.parquet(str(files))
    tables.append(schema.EVENTS, rows.select("event_id", "user_id", "input_id", "label", "weight"))
    rows.select("user", "input", "label").write.format("delta").save(numbers)
    als = ALS(
        rank=arguments.k,
        maxIter=arguments.iterations,
        regParam=0.05,
        userCol="user",
        itemCol="input",
        ratingCol="label",
        checkpointInterval=-1,
    )

    def fit_als() -> None:
        model = als.fit(spark.read.format("delta").load(numbers))
        model.userFactors.write.format("noop").mode("overwrite").save()

    def fit_ours() -> None:
        frames = (tables.read(name) for name in (schema.EVENTS, schema.INPUTS, schema.USER_ATTRIBUTES))
        train(*frames, settings).engine.close()

    fit_als(), fit_ours()  # warm-up: class loading, code generation, Python workers
    ours, theirs, peaks = [], [], []
    for _ in range(arguments.repeats):
        with PeakMemory() as memory:
            ours.append(seconds(fit_ours))
        peaks.append(memory.peak_gb)
        theirs.append(seconds(fit_als))
        print(f"{n_events} events: ours {ours[-1]:.1f} s, ALS {theirs[-1]:.1f} s", file=sys.stderr)
    written = None
    if not arguments.without_writing:
        with PeakMemory() as memory:
            written = seconds(lambda: retrain(tables, settings))
        peaks.append(memory.peak_gb)
    return {
        "events": n_events,
        "ours_seconds": statistics.median(ours),
        "als_seconds": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "written_seconds": written,
        "peak_gb": max(peaks),
        "all": {"ours": ours, "als": theirs},
    }


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
