"""MovieLens-100K in time order: every rating is predicted before it is learnt from.

Ours is the product as it runs, and has two answers to each rating. The server's (``served``) is asked for each rating and
then told it, one by one, and takes the tables over after every tenth of the ratings, when a new version is trained and goes
live. The stream's (``streamed``) comes from the ``progress`` table: the same ratings come through the events table in
batches of ``--batch``, and the update job predicts a batch as a whole, then adds it to its users. Attributes of a film come
with the tenth of its first rating; what ``update.learn_arrivals`` is worth is the difference that switching it off makes.

Beside it, on the same ratings after the first tenth: MLlib ALS, trained anew after every tenth (a user or an input that it
has not seen gets the mean), and, where the package river is installed, its matrix factorization with biases, event by event.

    python tests/bench/prequential.py [--batch 1000] [--only-ours] [--set SECTION.KEY=VALUE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pandas as pd
from pyspark.ml.recommendation import ALS
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from mtl import schema
from mtl.config import Settings, load_settings
from mtl.datasets import fetch_movielens, movielens
from mtl.layout import SCHEMAS
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import EVENT_ID, EVENT_TIME, EVENTS, INPUT_ID, INPUTS, LABEL, USER_ATTRIBUTES, USER_ID, WEIGHT
from mtl.serving.observations import Event
from mtl.serving.overlay import open_overlay
from mtl.serving.refresh import Refresher
from mtl.serving.source import Source
from mtl.serving.store import Store
from mtl.serving.view import View, open_view
from mtl.session import open_session
from mtl.tables import Tables
from mtl.update import update

CACHE = Path(tempfile.gettempdir()) / "oracle-mtl-movielens"
PARTS = 10
FORMS = ("served", "streamed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default=str(CACHE), help="folder of the downloaded data (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1000, help="ratings in a micro-batch (default: %(default)s)")
    parser.add_argument("--only-ours", action="store_true", help="nothing beside it")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="settings of the model")
    arguments = parser.parse_args()
    data = movielens(fetch_movielens(arguments.cache), 1)
    ratings = pd.concat([part.to_pandas() for part in (data.train, data.stream, data.test)])
    ratings = ratings.sort_values([EVENT_TIME, USER_ID, INPUT_ID], kind="stable").reset_index(drop=True)
    ratings[EVENT_ID] = ratings[USER_ID] + "-" + ratings[INPUT_ID]
    parts = np.array_split(np.arange(len(ratings)), PARTS)
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(
            [],
            [f"tables.root={folder}", "update.max_files_per_trigger=1", "care.compact_every_batches=0", *arguments.set],
        )
        spark = open_session(settings.spark, "bench prequential")
        ours = run(spark, settings, data.inputs.to_pandas(), data.users.to_pandas(), ratings, parts, arguments.batch)
        als = retrained_als(spark, ratings, parts) if not arguments.only_ours else None
    online = river(ratings, len(parts[0])) if not arguments.only_ours else None
    print(
        json.dumps(
            {
                "ratings": int(len(ratings) - len(parts[0])),
                "oracle_mtl": ours,
                "als": {"rmse": min(als.values()), "by_rank_and_regularization": als} if als else None,
                "river": online,
            }
        )
    )


class Served:
    """The server's copy of the tables and its answers, in this process."""

    def __init__(self, tables: Tables, folder: Path):
        self.store, self.overlay = Store(folder, 1), open_overlay(folder, [])
        self.refresher = Refresher(Source(tables.root), self.store, self.overlay)
        self.view: View | None = None

    def follow(self) -> None:
        """Take over what the tables have."""
        self.refresher.refresh()
        self.view = open_view(self.store, self.overlay, load_settings().serve, self.view)

    def squared_errors(self, ratings: pd.DataFrame) -> float:
        """Summed over ratings that are asked for and then told one after the other."""
        view, total = self.view, 0.0
        assert view is not None
        columns = (EVENT_ID, USER_ID, INPUT_ID, LABEL, EVENT_TIME)
        for event_id, user, item, label, time in zip(*(ratings[name] for name in columns), strict=True):
            weights = view.weights_of(user) or view.unknown_weights
            prediction = view.score(weights, view.rows_of([item]).rows)[0][0]
            total += (label - np.clip(prediction, *view.model.prediction_range)) ** 2
            at = datetime.fromtimestamp(time, timezone.utc).isoformat()
            self.overlay.insert([(Event(event_id, user, item, float(label), 1.0, at), True)])
        return total


def run(
    spark: SparkSession,
    settings: Settings,
    inputs: pd.DataFrame,
    users: pd.DataFrame,
    ratings: pd.DataFrame,
    parts: list[np.ndarray],
    batch: int,
) -> dict:
    tables = Tables(spark, settings.tables.root)
    tables.create(*SCHEMAS)
    part_of = np.concatenate([np.full(len(part), number) for number, part in enumerate(parts)])
    comes = inputs[INPUT_ID].map(pd.Series(part_of, ratings[INPUT_ID]).groupby(level=0).first())

    def come(part: int) -> None:
        if (comes == part).any():
            tables.append(INPUTS, spark.createDataFrame(inputs[comes == part]), evolve=True)

    come(0)
    tables.append(USER_ATTRIBUTES, spark.createDataFrame(users), evolve=True)
    append(tables, ratings.iloc[parts[0]])
    served = Served(tables, Path(settings.tables.root) / "_serving")
    by_part = []
    for number, part in enumerate(parts[1:], 1):
        version = retrain(tables, settings, promote=True)["model_version"]
        come(number)
        served.follow()
        errors = served.squared_errors(ratings.iloc[part])
        for first in range(0, len(part), batch):
            append(tables, ratings.iloc[part[first : first + batch]])
        update(tables, settings)
        row = of_version(tables, version)
        assert row["n"] == len(part)  # none waits: all inputs have attributes
        by_part.append({"n": len(part), "served": errors, "streamed": row["loss"]})
        print(json.dumps({name: (by_part[-1][name] / len(part)) ** 0.5 for name in FORMS}), file=sys.stderr)
    n = sum(part["n"] for part in by_part)
    return {
        **{name: {"rmse": (sum(part[name] for part in by_part) / n) ** 0.5} for name in FORMS},
        "k_of_last": load_model(tables).form.k,
        "rmse_by_part": {name: [(part[name] / part["n"]) ** 0.5 for part in by_part] for name in FORMS},
    }


def of_version(tables: Tables, version: int) -> dict[str, float]:
    rows = tables.read(schema.PROGRESS).where(F.col(schema.MODEL_VERSION) == version)
    found = rows.agg(F.sum(schema.VALIDATED).alias("n"), F.sum(schema.LOSS).alias("loss")).first()
    return found.asDict()


def append(tables: Tables, ratings: pd.DataFrame) -> None:
    """One commit of one file."""
    rows = tables.spark.createDataFrame(ratings[[EVENT_ID, USER_ID, INPUT_ID, LABEL, EVENT_TIME]]).coalesce(1)
    rows = rows.select(
        EVENT_ID,
        USER_ID,
        INPUT_ID,
        F.col(LABEL).cast("double").alias(LABEL),
        F.lit(1.0).alias(WEIGHT),
        F.col(EVENT_TIME).cast("timestamp").alias(EVENT_TIME),
        F.lit("bench").alias(schema.SOURCE),
        F.lit("bench").alias(schema.BATCH),
    )
    tables.append(EVENTS, rows)


def retrained_als(spark: SparkSession, ratings: pd.DataFrame, parts: list[np.ndarray]) -> dict[str, float]:
    """RMSE by setting: the best of them is looked up with the answers in hand, which favours ALS."""
    numbered = pd.DataFrame(
        {
            "user": ratings[USER_ID].astype(int),
            "item": ratings[INPUT_ID].astype(int),
            "label": ratings[LABEL].astype(float),
        }
    )
    errors = {}
    for rank in (5, 10):
        for regularization in (0.1, 0.2):
            als = ALS(
                rank=rank,
                regParam=regularization,
                maxIter=15,
                userCol="user",
                itemCol="item",
                ratingCol="label",
                seed=0,
            )
            squares = 0.0
            for i in range(1, len(parts)):
                known = numbered.iloc[np.concatenate(parts[:i])]
                model = als.fit(spark.createDataFrame(known))
                found = model.transform(spark.createDataFrame(numbered.iloc[parts[i]])).toPandas()
                prediction = found["prediction"].fillna(known["label"].mean()).clip(1, 5)
                squares += float(((found["label"] - prediction) ** 2).sum())
            errors[f"{rank}, {regularization}"] = (squares / sum(map(len, parts[1:]))) ** 0.5
    return errors


def river(ratings: pd.DataFrame, first: int) -> dict:
    """river's BiasedMF, event by event from the very first rating on; errors counted after the first tenth."""
    try:
        import river
        from river import optim, reco
    except ImportError:
        return {"rmse": None, "reason": "the package river is not installed"}
    errors = {}
    for n_factors in (5, 10):
        for rate in (0.01, 0.025, 0.05):
            model = reco.BiasedMF(
                n_factors=n_factors,
                bias_optimizer=optim.SGD(rate),
                latent_optimizer=optim.SGD(rate),
                l2_bias=0.01,
                l2_latent=0.05,
                seed=0,
            )
            squares = 0.0
            rows = zip(ratings[USER_ID], ratings[INPUT_ID], ratings[LABEL].astype(float), strict=True)
            for i, (user, item, label) in enumerate(rows):
                if i >= first:
                    squares += (label - min(5.0, max(1.0, model.predict_one(user, item)))) ** 2
                model.learn_one(user, item, label)
            errors[f"{n_factors}, {rate}"] = (squares / (len(ratings) - first)) ** 0.5
    return {"version": river.__version__, "rmse": min(errors.values()), "by_factors_and_rate": errors}


if __name__ == "__main__":
    main()
