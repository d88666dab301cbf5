"""Events per second through the whole update query, from Delta to the MERGE into users, against a floor.

The floor of a batch is what no update query can do without: its events and the rows of their users read and shuffled by
user, and a MERGE of as many ready-made rows into a copy of the users table. Ready-made rows are as full of digits as those of
users with events: rows that are all the same take a hundredth of the space, and no time to write. Both take ``--batches``
batches of each size one after the other, in one process, the floor with Delta's settings as they come. The ledger, the
progressive validation and the arithmetic are ours on top.

With ``--increments`` also what would be without MERGE: rows of users only appended, every reader taking the newest of each
user, and a compaction after the batches. Its batches are the floor's with an append in the place of the MERGE.

    python tests/bench/stream.py [--users 100000 1000000 --batches-of 20000 200000 1000000 --k 10 --increments]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from update import INPUTS, random_model

from mtl import gaussian, schema
from mtl.arrow import lists
from mtl.config import load_settings
from mtl.features import feature_rows
from mtl.layout import SCHEMAS
from mtl.model import Model, model_row
from mtl.models import publish
from mtl.schema import MODEL_VERSION, USER_ID
from mtl.session import open_session
from mtl.stream import Stream
from mtl.tables import Tables
from mtl.users import WRITTEN, SharedInputs

FILES = 2  # of a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--batches-of", type=int, nargs="+", default=[20_000, 200_000, 1_000_000], metavar="EVENTS")
    parser.add_argument("--batches", type=int, default=3, help="of each size; the first is not counted")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--increments", action="store_true", help="append-only rows of users as well")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(
            [], [f"tables.root={folder}", f"update.max_files_per_trigger={FILES}", "care.compact_every_batches=0"]
        )
        spark = open_session(settings.spark, "bench stream")
        for n_users in arguments.users:
            tables, model = prepare(spark, Path(folder) / str(n_users), n_users, arguments.k)
            stream = Stream(tables, settings, model)
            for n_events in arguments.batches_of:
                runs.append(measure(tables, stream, n_users, n_events, arguments.batches, arguments.increments))
                print(json.dumps(runs[-1]), file=sys.stderr)
            stream.close()
    print(json.dumps({"k": arguments.k, "inputs": INPUTS, "runs": runs}))


def prepare(spark: SparkSession, root: Path, n_users: int, k: int) -> tuple[Tables, Model]:
    """A live model, its features, and ``n_users`` users that each have some events already; and a copy of users."""
    tables = Tables(spark, str(root))
    tables.create(*SCHEMAS)
    model, inputs = random_model(k)
    rows = spark.createDataFrame(shared_rows(model, inputs))
    tables.append(schema.FEATURES, rows)
    users = states(spark, n_users, model.d)
    tables.append(schema.USERS, users)
    Tables(spark, str(root / "floor")).append(schema.USERS, users)
    publish(tables, model_row(model, "shared_basis", (), 0, {}, load_settings()))
    return tables, model


def shared_rows(model: Model, inputs: SharedInputs) -> pa.Table:
    n = len(inputs.ids)
    return feature_rows(1, inputs.ids, inputs.features, np.zeros((n, model.d)), np.zeros((n, 0)))


def states(spark: SparkSession, n_users: int, d: int) -> DataFrame:
    """Users with one event each, of an input of their own."""

    def partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            n, first = len(batch), batch.column(0)[0].as_py()
            phi = np.random.default_rng(first).normal(size=(n, d))
            sums, w, prior_mean = (gaussian.outer(phi), 3 * phi), phi / 2, np.zeros((n, d))
            columns = [batch.column(0).cast(pa.string()), *map(lists, (*sums, w, prior_mean))]
            never = pa.nulls(n, pa.timestamp("us", tz="UTC"))
            yield pa.record_batch([*columns, pa.array(np.ones(n, np.int64)), never], list(WRITTEN))

    kinds = {column.name: column.dataType.simpleString() for column in SCHEMAS[schema.USERS]}
    rows = spark.range(0, n_users, 1, 4).mapInArrow(partition, ", ".join(f"{name} {kinds[name]}" for name in WRITTEN))
    return rows.withColumn(MODEL_VERSION, F.lit(1).cast("long"))


def measure(
    tables: Tables, stream: Stream, n_users: int, n_events: int, batches: int, with_increments: bool = False
) -> dict:
    """Ours: ``batches`` micro-batches of one run of the query, after one that is not counted. The floor: as many in a row."""
    spark = tables.spark
    floor = Tables(spark, str(Path(tables.root) / "floor"))
    touched = int(n_users * (1 - np.exp(-n_events / n_users)))
    ready = f"{tables.root}/ready-{n_events}"
    states(spark, touched, stream.model.d).select(*WRITTEN, MODEL_VERSION).write.parquet(ready)
    commits = []
    for i in range(batches + 1):
        tables.append(schema.EVENTS, events(spark, n_events, n_users, f"{n_users}-{n_events}-{i}"))
        commits.append(tables.version(schema.EVENTS))
    ends: list[float] = []
    phases: list[dict[str, float]] = []
    apply = stream.updater.apply

    def timed(batch: DataFrame, number: int) -> None:
        apply(batch, number)
        ends.append(time.perf_counter())
        phases.append(dict(stream.updater.seconds))

    stream.updater.apply = timed  # type: ignore[method-assign]
    stream.drain()
    stream.updater.apply = apply  # type: ignore[method-assign]
    assert len(ends) == batches + 1
    theirs = []
    for commit in commits:
        started = time.perf_counter()
        shuffle(floor.read(schema.USERS), tables, commit)
        merge(floor, spark.read.parquet(ready))
        theirs.append(time.perf_counter() - started)
    seconds, floor_seconds = (ends[-1] - ends[0]) / batches, sum(theirs[1:]) / batches
    return {
        "users": n_users,
        "events": n_events,
        "users_touched": touched,
        "seconds": seconds,
        "floor_seconds": floor_seconds,
        "ratio": seconds / floor_seconds,
        "events_per_second": n_events / seconds,
        "phases": phases[-1],
        "all": {"ours": np.diff(ends).tolist(), "floor": theirs[1:]},
        **({"increments": increments(tables, commits, ready)} if with_increments else {}),
    }


def increments(tables: Tables, commits: list[int], ready: str) -> dict:
    """Seconds of the batches with rows of users appended, and of the compaction after all of them."""
    appended = Tables(tables.spark, f"{tables.root}/appended")
    appended.append(schema.USERS, Tables(tables.spark, f"{tables.root}/floor").read(schema.USERS))
    seconds = []
    for number, commit in enumerate(commits, 1):
        started = time.perf_counter()
        shuffle(newest(appended), tables, commit)
        rows = tables.spark.read.parquet(ready).withColumn(schema.N_EVENTS, F.lit(number).cast("long"))
        appended.append(schema.USERS, rows)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    newest(appended).write.format("delta").mode("overwrite").save(f"{appended.root}/{schema.USERS}")
    compaction = time.perf_counter() - started
    shutil.rmtree(appended.root)
    return {"seconds": statistics.mean(seconds[1:]), "all": seconds, "compaction_seconds": compaction}


def newest(appended: Tables) -> DataFrame:
    """The row of every user that was appended last, which has most events."""
    rows = appended.read(schema.USERS)
    last = rows.groupBy(USER_ID).agg(F.max(schema.N_EVENTS).alias(schema.N_EVENTS))
    return rows.join(last, [USER_ID, schema.N_EVENTS], "left_semi")


def events(spark: SparkSession, n: int, n_users: int, name: str) -> DataFrame:
    uniform = spark.range(0, n, 1, FILES).select(
        F.concat(F.lit(f"{name}-"), F.col("id").cast("string")).alias(schema.EVENT_ID),
        F.floor(F.rand(1) * n_users).cast("string").alias(USER_ID),
        F.floor(F.rand(2) * INPUTS).cast("string").alias(schema.INPUT_ID),
        (F.rand(3) * 4 + 1).alias(schema.LABEL),
        F.lit(1.0).alias(schema.WEIGHT),
        F.current_timestamp().alias(schema.EVENT_TIME),
        F.lit("bench").alias(schema.SOURCE),
        F.lit(name).alias(schema.BATCH),
    )
    return uniform


def shuffle(users: DataFrame, tables: Tables, commit: int) -> None:
    """The events of a commit and the rows of their users, read and shuffled by user."""
    before = set(tables.read(schema.EVENTS, commit - 1).inputFiles())
    new = [path for path in tables.read(schema.EVENTS, commit).inputFiles() if path not in before]
    rows = tables.spark.read.parquet(*new).select(USER_ID, schema.INPUT_ID, schema.LABEL, schema.WEIGHT)
    stored = users.select(USER_ID, schema.A, schema.B, schema.PRIOR_MEAN, schema.N_EVENTS)
    stored = stored.join(rows.select(USER_ID), USER_ID, "left_semi")
    partitions = tables.spark.sparkContext.defaultParallelism
    both = rows.unionByName(stored, allowMissingColumns=True)
    both.repartition(partitions, USER_ID).agg(F.bit_xor(F.xxhash64("*"))).collect()  # all columns are needed


def merge(tables: Tables, rows: DataFrame) -> None:
    same = f"stored.{MODEL_VERSION} = 1 AND stored.{USER_ID} = new.{USER_ID}"
    values = {name: F.col(f"new.{name}") for name in (MODEL_VERSION, *WRITTEN)}
    into = tables.delta(schema.USERS).alias("stored").merge(rows.alias("new"), same)
    into.whenMatchedUpdate(set=values).whenNotMatchedInsert(values=values).execute()


if __name__ == "__main__":
    main()
