"""Seconds of the n best items for every user, against MLlib ALS and against the bare matrix product.

A fitted OracleMTLModel and an ALSModel of the same users, items and rank; both recommend for all users in turn, into a no-op
write, ``--repeats`` times. The product is NumPy's in this process, in blocks of 64 users that stay in the cache, on one
thread, and nothing else: divided by the number of Spark's tasks it is the floor.

    python tests/bench/recommend.py [--users 50000 --items 20000]
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pyspark.ml.recommendation import ALS
from pyspark.sql import DataFrame
from synthetic import RANK, write_events

from mtl import OracleMTL
from mtl.config import load_settings
from mtl.session import open_session

N = 10
_QUERIES_AT_ONCE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spark = open_session(load_settings().spark, "bench recommend")
        files = write_events(Path(folder), arguments.events, arguments.users, arguments.items)
        events = spark.read.parquet(str(files)).select("user", "input", "label").cache()
        names = {"userCol": "user", "itemCol": "input", "rank": RANK}
        ours = OracleMTL(**names, settings={"train.iterations": 2, "oracle.kind": "identity"}).fit(events)
        als = ALS(**names, maxIter=2, ratingCol="label").fit(events)
        n_users, n_items = ours.userFactors.count(), ours.itemFactors.count()
        work: dict[str, Callable[[], object]] = {
            "ours": lambda: write(ours.recommendForAllUsers(N)),
            "als": lambda: write(als.recommendForAllUsers(N)),
            "product": product(n_users, n_items),
        }
        taken: dict[str, list[float]] = {name: [] for name in work}
        for i in range(arguments.repeats + 1):
            for name, task in work.items():
                started = time.perf_counter()
                task()
                if i:  # the first is a warm-up
                    taken[name].append(time.perf_counter() - started)
            print({name: f"{seconds[-1]:.2f} s" for name, seconds in taken.items() if seconds}, file=sys.stderr)
        seconds = {name: statistics.median(values) for name, values in taken.items()}
        cores = spark.sparkContext.defaultParallelism
    print(
        json.dumps(
            {
                "users": n_users,
                "items": n_items,
                "k": RANK,
                "n": N,
                "cores": cores,
                "ours_seconds": seconds["ours"],
                "als_seconds": seconds["als"],
                "product_seconds_one_thread": seconds["product"],
                "ours_to_als": seconds["ours"] / seconds["als"],
                "ours_to_product_on_all_cores": seconds["ours"] / (seconds["product"] / cores),
                "all": taken,
            }
        )
    )


def write(rows: DataFrame) -> None:
    rows.write.format("noop").mode("overwrite").save()


def product(n_users: int, n_items: int) -> Callable[[], None]:
    random = np.random.default_rng(0)
    users, items = (random.normal(size=(n, RANK + 2)) for n in (n_users, n_items))
    out = np.empty((_QUERIES_AT_ONCE, n_items))

    def multiply() -> None:
        for first in range(0, n_users - _QUERIES_AT_ONCE, _QUERIES_AT_ONCE):
            np.matmul(users[first : first + _QUERIES_AT_ONCE], items.T, out=out)

    return multiply


if __name__ == "__main__":
    main()
