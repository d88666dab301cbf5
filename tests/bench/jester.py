"""Jester: 100 jokes with their text, rated from −10 to 10; a hybrid beside its halves and MLlib ALS, and jokes held out.

``warm``: RMSE on a random fifth of every user's ratings of the hybrid (an oracle on the text's character trigrams and a free
value per joke), of each half (the text alone; the free values alone, which is matrix factorization) and of ALS, whose rank
and regularization are chosen on a part of the training ratings.

``cold``: the same on jokes held out altogether, which only their text describes; beside every user's mean rating.

    python tests/bench/jester.py --data FOLDER [--users 2000]
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
from experiment import arguments, fit, read, rmse, session, summary
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from mtl import baselines
from mtl.config import load_settings
from mtl.model import Model
from mtl.schema import EVENT_ID, INPUT_ID, LABEL, USER_ID, WEIGHT

TEST_FRACTION, COLD_INPUTS = 0.2, 20
MODELS = {
    "hybrid": ("oracle.residual=true",),
    "text": ("oracle.residual=false",),
    "factors": ("oracle.kind=identity",),
}
# Regularization acts on the labels' scale, about five times that of stars.
ALS = ("evaluate.als_ranks=[5, 10, 20]", "evaluate.als_regularization=[0.1, 0.3, 0.6, 1.2]")


def main() -> None:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--users", type=int, default=2000, help="size of the sample of users; 0: all")
    parser.add_argument("--without-als", action="store_true", help="leave out ALS, whose grid takes longest")
    arguments_ = parser.parse_args()
    events, inputs = read(arguments_.data, "jester", "input_id, text")
    spark = session("jester")
    warm, cold = [], []
    for seed in range(arguments_.seed, arguments_.seed + arguments_.repeats):
        random = np.random.default_rng(seed)
        rows = sampled(events, arguments_.users, random)
        warm.append(warm_inputs(spark, rows, inputs, random, arguments_))
        print(f"warm, split {seed}: {warm[-1]}", file=sys.stderr)
        cold.append(cold_inputs(spark, rows, inputs, random, arguments_))
        print(f"cold, split {seed}: {cold[-1]}", file=sys.stderr)
    told = {
        name: {model: summary([run[model] for run in runs]) for model in runs[0] if isinstance(runs[0][model], float)}
        for name, runs in (("warm", warm), ("cold", cold))
    }
    print(json.dumps({"experiment": "jester", "users": rows[USER_ID].nunique(), "measure": "rmse", **told}))


def sampled(events: pd.DataFrame, users: int, random: np.random.Generator) -> pd.DataFrame:
    """The events of some users, in random order."""
    ids = events[USER_ID].unique()
    chosen = events[events[USER_ID].isin(random.choice(ids, users, replace=False))] if users else events
    return chosen.iloc[random.permutation(len(chosen))].reset_index(drop=True)


def warm_inputs(spark: SparkSession, rows: pd.DataFrame, inputs: pd.DataFrame, random, arguments_) -> dict:
    place, size = rows.groupby(USER_ID).cumcount(), rows[USER_ID].map(rows[USER_ID].value_counts())
    test = (place < (TEST_FRACTION * size).round()).to_numpy()
    told = {}
    for name, assignments in MODELS.items():
        fitted = fit(spark, rows[~test], inputs, [*assignments, *arguments_.set])
        told[name] = error(fitted, rows[test], inputs)
    if not arguments_.without_als:
        told["als"], told["als_chosen"] = als(spark, rows[~test], rows[test], fitted.model)
    return told


def cold_inputs(spark: SparkSession, rows: pd.DataFrame, inputs: pd.DataFrame, random, arguments_) -> dict:
    held_out = inputs[INPUT_ID].isin(random.choice(inputs[INPUT_ID], COLD_INPUTS, replace=False))
    test = rows[INPUT_ID].isin(inputs[INPUT_ID][held_out]).to_numpy()
    told = {}
    for name in ("hybrid", "text"):
        fitted = fit(spark, rows[~test], inputs[~held_out], [*MODELS[name], *arguments_.set])
        told[name] = error(fitted, rows[test], inputs)
    means = rows[~test].groupby(USER_ID)[LABEL].mean()
    told["user_mean"] = float(np.sqrt(np.mean((rows[LABEL] - rows[USER_ID].map(means))[test] ** 2)))
    # The same shrunk to the mean of all, by the prior that an intercept per user alone would learn.
    fitted = fit(spark, rows[~test], inputs[~held_out].assign(text=None), ["model.k=1", *arguments_.set])
    told["no_text"] = error(fitted, rows[test], inputs.assign(text=None))
    return told


def error(fitted, rows: pd.DataFrame, inputs: pd.DataFrame) -> float:
    return rmse(rows[LABEL], fitted.predict(rows, inputs).prediction.to_numpy(), fitted.model)


def als(spark: SparkSession, train: pd.DataFrame, test: pd.DataFrame, model: Model) -> tuple[float, dict]:
    settings = load_settings((), ALS).evaluate
    events = train.assign(**{EVENT_ID: np.arange(len(train)).astype(str), WEIGHT: 1.0})
    known, rows = spark.createDataFrame(events).persist(), spark.createDataFrame(test)
    mean = float(train[LABEL].mean())
    validating = baselines.held_out(settings.validation_fraction)
    chosen = baselines.choose_als(known.where(~validating), known.where(validating), mean, settings, model)
    predicted = baselines.with_als(chosen, known, baselines.with_input_mean(known, rows, mean))
    scored = predicted.select(LABEL, F.col(baselines.ALS_BEST).alias("prediction")).toPandas()
    known.unpersist()
    setting = {"rank": chosen.getRank(), "regularization": chosen.getRegParam()}
    return rmse(scored[LABEL], scored.prediction.to_numpy(), model), setting


if __name__ == "__main__":
    main()
