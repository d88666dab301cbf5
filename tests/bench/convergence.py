"""How many iterations reach the error that MLlib ALS ends at: events of a planted model, a tenth held out, one session.

ALS has the best of several regularizations, chosen by the events held out, in hindsight. Ours has nothing to choose.

    python tests/bench/convergence.py [--events 1000000] [--iterations 10]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from pyspark.ml.recommendation import ALS
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from synthetic import RANK, write_events

from mtl import schema
from mtl.config import load_settings
from mtl.fitting import train
from mtl.layout import SCHEMAS
from mtl.score import PREDICTION, score_rows
from mtl.session import open_session

USERS, INPUTS = 50_000, 10_000
REGULARIZATION = (0.05, 0.1, 0.2, 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--iterations", type=int, default=10, help="of ALS (default: %(default)s)")
    parser.add_argument("--k", type=int, default=RANK)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = ["tables.root=unused", f"model.k={arguments.k}", "oracle.kind=identity"]
        spark = open_session(load_settings([], settings).spark, "bench convergence")
        rows = spark.read.parquet(str(write_events(Path(folder), arguments.events, USERS, INPUTS))).persist()
        held = F.pmod(F.xxhash64("user", "input"), F.lit(10)) == 0
        seen, test = rows.where(~held).persist(), rows.where(held).persist()
        theirs = {reg: als(seen, test, arguments.k, arguments.iterations, reg) for reg in REGULARIZATION}
        best = min(theirs, key=lambda reg: theirs[reg])
        ours: list[float] = []
        for iterations in range(1, arguments.iterations + 1):
            ours.append(oracle_mtl(spark, seen, test, [*settings, f"train.iterations={iterations}"]))
            print(f"{iterations} iterations: ours {ours[-1]:.4f}, ALS ends at {theirs[best]:.4f}", file=sys.stderr)
        reached = next((i for i, error in enumerate(ours, 1) if error <= theirs[best]), None)
        print(
            json.dumps(
                {
                    "events": arguments.events,
                    "k": arguments.k,
                    "als_iterations": arguments.iterations,
                    "als_regularization": best,
                    "als_rmse": round(theirs[best], 4),
                    "rmse_by_iterations": [round(error, 4) for error in ours],
                    "iterations_to_als": reached,
                }
            )
        )


def als(seen: DataFrame, test: DataFrame, k: int, iterations: int, regularization: float) -> float:
    estimator = ALS(
        rank=k,
        maxIter=iterations,
        regParam=regularization,
        userCol="user",
        itemCol="input",
        ratingCol="label",
        seed=0,
        coldStartStrategy="drop",
        checkpointInterval=-1,
    )
    return _rmse(estimator.fit(seen).transform(test))


def oracle_mtl(spark: SparkSession, seen: DataFrame, test: DataFrame, assignments: list[str]) -> float:
    empty = (spark.createDataFrame([], SCHEMAS[name]) for name in (schema.INPUTS, schema.USER_ATTRIBUTES))
    trained = train(seen, *empty, load_settings([], assignments))
    try:
        model = trained.model(1, schema.LIVE, 0, 0)
        frames = trained.feature_rows(1), trained.user_rows(1)
        return _rmse(score_rows(model, *frames, None, None, test))
    finally:
        trained.engine.close()


def _rmse(rows: DataFrame) -> float:
    return float(np.sqrt(rows.agg(F.avg((F.col(PREDICTION) - F.col("label")) ** 2)).first()[0]))


if __name__ == "__main__":
    main()
