"""Seconds of adding a batch of events to a table that has many: by the index of event ids, and by MERGE.

Each way has a table of its own with the same events. A batch is ``--batch`` events of which a tenth are in the table;
the time is from rows in memory to the commit and the count of what is new: what one micro-batch spends on it. Both in
turn, ``--repeats`` times; ``build_seconds`` is what the index takes to come into being.

    python tests/bench/ingest.py [--table 0 1000000 10000000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from mtl import schema
from mtl.batches import Batch, count_rows
from mtl.config import load_settings
from mtl.ingest import merge_events
from mtl.known import KnownEvents
from mtl.session import open_session
from mtl.tables import Tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, nargs="+", default=[0, 1_000_000, 10_000_000])
    parser.add_argument("--batch", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    spark = open_session(load_settings().spark, "bench ingest")
    results = []
    for n in arguments.table:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(spark, Path(folder), n, arguments.batch, arguments.repeats))
        print(results[-1], file=sys.stderr)
    print(json.dumps({"batch": arguments.batch, "runs": results}))


def measure(spark: SparkSession, folder: Path, n: int, batch: int, repeats: int) -> dict:
    indexed, merged = (Tables(spark, str(folder / name)) for name in ("indexed", "merged"))
    for tables in (indexed, merged):
        tables.create(schema.EVENTS, schema.LEDGER)
        if n:
            tables.append(schema.EVENTS, events(spark, 0, n, "base"))
    known = KnownEvents(indexed, str(folder / "ids"))
    begun = time.perf_counter()
    known.refresh()
    built = time.perf_counter() - begun
    taken: dict[str, list[float]] = {"index": [], "merge": []}
    begin = n
    for i in range(repeats + 1):  # the first warms up
        repeated = min(begin, batch // 10)
        one, end = Batch("bench", i), begin + batch - repeated
        offered = events(spark, begin - repeated, end, one.name).persist()
        offered.count()
        for way, tables, add in (("index", indexed, by_index), ("merge", merged, by_merge)):
            started = time.perf_counter()
            accepted = add(tables, known, offered, one)
            if i:
                taken[way].append(time.perf_counter() - started)
            assert accepted == end - begin, (way, accepted)
        offered.unpersist()
        begin = end
    counts = [tables.read(schema.EVENTS).count() for tables in (indexed, merged)]
    assert counts == [begin, begin], counts
    medians = {f"{way}_seconds": round(statistics.median(seconds), 2) for way, seconds in taken.items()}
    rounded = {way: [round(one, 2) for one in seconds] for way, seconds in taken.items()}
    return {"table": n, **medians, "build_seconds": round(built, 1), "all": rounded}


def events(spark: SparkSession, begin: int, end: int, batch: str) -> DataFrame:
    number = F.col("id")
    return spark.range(begin, end, 1, 4).select(
        F.substring(F.sha2(number.cast("string"), 256), 1, 32).alias(schema.EVENT_ID),
        (number % 100_003).cast("string").alias(schema.USER_ID),
        (number % 20_011).cast("string").alias(schema.INPUT_ID),
        (number % 5).cast("double").alias(schema.LABEL),
        F.lit(1.0).alias(schema.WEIGHT),
        F.timestamp_seconds(number).alias(schema.EVENT_TIME),
        F.lit("bench").alias(schema.SOURCE),
        F.lit(batch).alias(schema.BATCH),
    )


def by_index(tables: Tables, known: KnownEvents, offered: DataFrame, batch: Batch) -> int | None:
    return known.append(offered, batch)


def by_merge(tables: Tables, known: KnownEvents, offered: DataFrame, batch: Batch) -> int:
    merge_events(tables, offered, batch)
    return count_rows(tables, schema.EVENTS, batch.name)


if __name__ == "__main__":
    main()
