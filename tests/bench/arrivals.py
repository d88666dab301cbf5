"""What learning new inputs online is worth: MovieLens-100K in time order, trained once, then streamed.

A version is trained on the first part of the ratings, with the attributes of all films. The others come in micro-batches of
``--batch``; each batch is predicted, then added, by the stream with ``update.learn_arrivals`` and by one without, on copies of
the same tables, and nothing is retrained. RMSE is given of all of them, and of the ratings of films that training had no rating
of by how many the film had had before.

    python tests/bench/arrivals.py [--trained 0.5] [--batch 250]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from prequential import CACHE, append
from pyspark.sql import SparkSession

from mtl.config import Settings, load_settings
from mtl.datasets import fetch_movielens, movielens
from mtl.layout import SCHEMAS
from mtl.models import load_model
from mtl.retrain import retrain
from mtl.schema import EVENT_ID, EVENT_TIME, INPUT_ID, INPUTS, LABEL, USER_ATTRIBUTES, USER_ID
from mtl.score import PREDICTION, score
from mtl.session import open_session
from mtl.stream import Stream
from mtl.tables import Tables

SEEN = {"0": 0, "1-3": 1, "4-15": 4, "16-": 16}  # ratings that a film had had: a bin begins at each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default=str(CACHE), help="folder of the downloaded data (default: %(default)s)")
    parser.add_argument("--trained", type=float, default=0.5, help="part of the ratings (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=250, help="ratings in a micro-batch (default: %(default)s)")
    arguments = parser.parse_args()
    data = movielens(fetch_movielens(arguments.cache), 1)
    ratings = pd.concat([part.to_pandas() for part in (data.train, data.stream, data.test)])
    ratings = ratings.sort_values([EVENT_TIME, USER_ID, INPUT_ID], kind="stable").reset_index(drop=True)
    ratings[EVENT_ID] = ratings[USER_ID] + "-" + ratings[INPUT_ID]
    before, after = np.split(np.arange(len(ratings)), [int(arguments.trained * len(ratings))])
    batches = np.split(after, np.arange(arguments.batch, len(after), arguments.batch))
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings([], [f"tables.root={folder}/learnt", "care.compact_every_batches=0"])
        spark = open_session(settings.spark, "bench arrivals")
        learnt = Tables(spark, settings.tables.root)
        learnt.create(*SCHEMAS)
        learnt.append(INPUTS, spark.createDataFrame(data.inputs.to_pandas()), evolve=True)
        learnt.append(USER_ATTRIBUTES, spark.createDataFrame(data.users.to_pandas()), evolve=True)
        append(learnt, ratings.iloc[before])
        retrain(learnt, settings)
        shutil.copytree(f"{folder}/learnt", f"{folder}/not_learnt")
        errors = {
            name: streamed(
                spark,
                load_settings(
                    [],
                    [
                        f"tables.root={folder}/{name}",
                        f"update.learn_arrivals={is_learnt}",
                        "care.compact_every_batches=0",
                    ],
                ),
                ratings,
                batches,
            )
            for name, is_learnt in (("learnt", "true"), ("not_learnt", "false"))
        }
    films = ratings[INPUT_ID].iloc[after]
    is_new = ~films.isin(set(ratings[INPUT_ID].iloc[before])).to_numpy()
    seen = films.groupby(films).cumcount().to_numpy()
    bins = np.searchsorted(list(SEEN.values()), seen, side="right") - 1
    chosen = {"all": np.full(len(films), True), "of new films": is_new}
    chosen |= {f"of new films, seen {name}": is_new & (bins == i) for i, name in enumerate(SEEN)}
    rmse = {
        name: {"ratings": int(which.sum())}
        | {way: float(np.sqrt(np.mean(of[which] ** 2))) for way, of in errors.items()}
        for name, which in chosen.items()
    }
    print(json.dumps({"trained": len(before), "batch": arguments.batch, "rmse": rmse}))


def streamed(spark: SparkSession, settings: Settings, ratings: pd.DataFrame, batches: list[np.ndarray]) -> np.ndarray:
    """Errors of the ratings of all batches, in their order, each batch predicted before it is added."""
    tables = Tables(spark, settings.tables.root)
    model, errors = load_model(tables), []
    stream = Stream(tables, settings, model)
    for number, batch in enumerate(batches):
        asked = ratings.iloc[batch][[EVENT_ID, USER_ID, INPUT_ID, LABEL]]
        found = score(tables, model, spark.createDataFrame(asked)).toPandas().set_index(EVENT_ID)
        prediction = found[PREDICTION].reindex(asked[EVENT_ID]).clip(*model.prediction_range)
        errors.append(prediction.to_numpy() - asked[LABEL].to_numpy(float))
        append(tables, ratings.iloc[batch])
        stream.drain()
        print(f"{Path(tables.root).name}: batch {number + 1} of {len(batches)}", file=sys.stderr)
    stream.close()
    return np.concatenate(errors)


if __name__ == "__main__":
    main()
