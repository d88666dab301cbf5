"""Retraining on the events since the live version alone, against training on all: seconds, and error on events held out.

Events of a planted model; the last part of them comes after a first version. Then in turn, from the same tables: that version with
its users brought up to date (train.lock of its features), incremental training, and training on all events, cold and from
the first version.

    python tests/bench/incremental.py [--events 1000000] [--later 0.3]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from synthetic import RANK, write_events

from mtl import schema
from mtl.config import Settings, load_settings
from mtl.layout import SCHEMAS
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.score import PREDICTION, score
from mtl.session import open_session
from mtl.tables import Tables

USERS, INPUTS, ITERATIONS = 100_000, 20_000, 20
WAYS = {
    "users_only": 'train.lock=["features"]',
    "incremental": "train.incremental=true",
    "warm": "train.warm_start=true",
    "cold": "train.warm_start=false",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument(
        "--later", type=float, default=0.3, help="part that comes after the first version (default: %(default)s)"
    )
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common = [f"tables.root={folder}/tables", f"model.k={RANK}", "oracle.kind=identity"]
        common.append(f"train.iterations={arguments.iterations}")
        spark = open_session(load_settings([], common).spark, "bench incremental")
        rows = spark.read.parquet(str(write_events(Path(folder), arguments.events, USERS, INPUTS)))
        tables = Tables(spark, f"{folder}/tables")
        place = F.pmod(F.xxhash64("event_id"), F.lit(10_000)) / 10_000
        test = rows.where(place >= 0.98).persist()
        later = (place >= 0.98 - arguments.later) & (place < 0.98)
        tables.create(*SCHEMAS)
        for batch, part in (("first", place < 0.98 - arguments.later), ("later", later)):
            columns = ("event_id", "user_id", "input_id", "label", "weight")
            tables.append(schema.EVENTS, rows.where(part).select(*columns, F.lit(batch).alias(schema.BATCH)))
            if batch == "first":
                retrain(tables, load_settings([], common))
        told = {name: measure(tables, load_settings([], [*common, way]), test) for name, way in WAYS.items()}
        print(json.dumps({"events": arguments.events, "later": arguments.later, "k": RANK, **told}))


def measure(tables: Tables, settings: Settings, test: DataFrame) -> dict[str, float]:
    started = time.perf_counter()
    report = retrain(tables, settings)
    seconds = time.perf_counter() - started
    model = load_model(tables, report["model_version"])
    scored = score(tables, model, test.select("user_id", "input_id", "label"))
    error = float(np.sqrt(scored.agg(F.avg((F.col(PREDICTION) - F.col("label")) ** 2)).first()[0]))
    print(f"{report['model_version']}: {seconds:.1f} s, RMSE {error:.4f}", file=sys.stderr)
    return {"seconds": round(seconds, 1), "rmse": round(error, 4), "iterations": report["iterations"]}


if __name__ == "__main__":
    main()
