"""Figure 1 of the paper on real data: what a pool of tasks is worth, and what a new user's first examples are worth.

``pool`` (1a): explained variance on the test part of some tasks against the number of tasks in the pool that training
sees, theirs among them: multi-task, independent and pooled regression. School (--data) and, as RMSE, MovieLens-100K.

``new-users`` (1b): RMSE for users who were not in training, against the number of their examples. Beside ours MLlib ALS
with the user folded in (ridge on its input factors; the input's mean where the user has no example) and a ridge of the
user's own on genres and year. MovieLens-100K.

Curves are means over ``--repeats`` with 95% intervals; PNG and JSON go to ``--out``.

    python tests/bench/figure1.py [pool new-users] [--data DIR] [--out figures]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from experiment import Fitted, encoded, fit, read, rmse, session, summary
from movielens import CACHE
from pyspark.ml.recommendation import ALS
from pyspark.sql import SparkSession
from school import ridge, tested
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from mtl import schema
from mtl.datasets import fetch_movielens, movielens
from mtl.figures import Curve, plot_curves
from mtl.gaussian import Array
from mtl.schema import INPUT_ID, LABEL, USER_ID, WEIGHT
from mtl.users import add_events

EXAMPLES = (0, 1, 2, 5, 10, 20, 50)
NEW_USERS, SCHOOLS, RATERS = 200, 10, 40
MULTI, INDEPENDENT, POOLED, FOLDED = "multi-task", "independent", "pooled", "ALS, folded in"
Points = dict[str, dict[int, list[float]]]  # method → x → values over repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", default=["pool", "new-users"], metavar="FIGURE")
    parser.add_argument("--data", default=os.environ.get("MTL_DATA"), help="folder of School (default: MTL_DATA)")
    parser.add_argument("--cache", default=str(CACHE), help="folder of the downloaded MovieLens (default: %(default)s)")
    parser.add_argument("--out", default="figures", help="folder for PNG and JSON (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    spark, out = session("figure 1"), Path(arguments.out)
    drawn = {}
    if "pool" in arguments.figures:
        ratings, movies, users = whole(arguments.cache)
        points = over(arguments.repeats, lambda seed: pool_of_raters(spark, ratings, movies, users, seed))
        drawn["1a_movielens"] = draw(
            out,
            "1a_movielens",
            points,
            "Users in the pool: MovieLens-100K",
            "users in the pool",
            "RMSE (stars)",
        )
        if arguments.data:
            events, inputs = read(arguments.data, "school", "input_id, x0 … x26")
            points = over(arguments.repeats, lambda seed: pool_of_schools(spark, events, inputs, seed))
            drawn["1a_school"] = draw(
                out,
                "1a_school",
                points,
                "Schools in the pool: School",
                "schools in the pool",
                "explained variance",
            )
        else:
            print("1a on School is not drawn: name its folder with --data or MTL_DATA", file=sys.stderr)
    if "new-users" in arguments.figures:
        ratings, movies, _ = whole(arguments.cache)
        points = over(arguments.repeats, lambda seed: new_users(spark, ratings, movies, seed))
        drawn["1b_movielens"] = draw(
            out,
            "1b_movielens",
            points,
            "Users who were not in training: MovieLens-100K",
            "examples of the user",
            "RMSE (stars)",
        )
    print(json.dumps({"experiment": "figure 1", "repeats": arguments.repeats, **drawn}))


def over(repeats: int, once: Callable[[int], dict[str, dict[int, float]]]) -> Points:
    points: Points = {}
    for seed in range(repeats):
        found = once(seed)
        print(f"repeat {seed}: {found}", file=sys.stderr)
        for name, values in found.items():
            for x, value in values.items():
                points.setdefault(name, {}).setdefault(x, []).append(value)
    return points


def draw(out: Path, name: str, points: Points, title: str, x: str, y: str) -> dict:
    told = {method: {at: summary(values) for at, values in by_x.items()} for method, by_x in points.items()}
    curves = {}
    for method, by_x in told.items():
        mean = [of["mean"] for of in by_x.values()]
        low, high = zip(*(of.get("interval", [of["mean"]] * 2) for of in by_x.values()), strict=True)
        curves[method] = Curve(list(by_x), mean, low, high)
    plot_curves(out / f"{name}.png", curves, title, f"{x} (logarithmic)", y, x_log=True)
    (out / f"{name}.json").write_text(json.dumps(told, indent=1))
    return told


def whole(cache: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    data = movielens(fetch_movielens(cache), 1)
    ratings = pd.concat([part.to_pandas() for part in (data.train, data.stream, data.test)], ignore_index=True)
    return ratings[[USER_ID, INPUT_ID, LABEL]], data.inputs.to_pandas(), data.users.to_pandas()


def pool_of_schools(spark: SparkSession, events: pd.DataFrame, inputs: pd.DataFrame, seed: int) -> dict:
    """Explained variance on the test part of some schools."""
    test = tested(events[USER_ID], 0.25, seed)
    order = np.random.default_rng(seed).permutation(events[USER_ID].unique())
    targets = order[:SCHOOLS]
    sizes = [n for n in (SCHOOLS, 20, 40, 80) if n < len(order)] + [len(order)]
    found: dict[str, dict[int, float]] = {}
    asked = events[test & events[USER_ID].isin(targets)]
    for size in sizes:
        train = events[~test & events[USER_ID].isin(order[:size])]
        fitted = fit(spark, train, inputs[inputs[INPUT_ID].isin(train[INPUT_ID])], ["model.form=multilevel"])
        z, z_test = (encoded(fitted, inputs, part[INPUT_ID]) for part in (train, asked))
        y, everyone = train[LABEL].to_numpy(), np.zeros(len(train))
        predictions = {
            MULTI: fitted.predict(asked, inputs).prediction.to_numpy(),
            POOLED: ridge(z, y, everyone, z_test, np.zeros(len(asked))),
        }
        if size == sizes[0]:  # a school's own regression knows nothing of the pool
            own = ridge(z, y, train[USER_ID].to_numpy(), z_test, asked[USER_ID].to_numpy())
        for name, prediction in {**predictions, INDEPENDENT: own}.items():
            found.setdefault(name, {})[size] = float(r2_score(asked[LABEL], prediction))
    return found


def pool_of_raters(
    spark: SparkSession, ratings: pd.DataFrame, movies: pd.DataFrame, users: pd.DataFrame, seed: int
) -> dict:
    """RMSE on the test part of some users' ratings."""
    test = tested(ratings[USER_ID], 0.2, seed)
    order = np.random.default_rng(seed).permutation(ratings[USER_ID].unique())
    found: dict[str, dict[int, float]] = {}
    asked = ratings[test & ratings[USER_ID].isin(order[:RATERS])]
    sizes = [RATERS, 80, 160, 320, len(order)]
    for size in sizes:
        train = ratings[~test & ratings[USER_ID].isin(order[:size])]
        fitted = fit(spark, train, movies, [], users)
        z, z_test = (encoded(fitted, movies, part[INPUT_ID]) for part in (train, asked))
        y = train[LABEL].to_numpy()
        if size == sizes[0]:
            own = ridge(z, y, train[USER_ID].to_numpy(), z_test, asked[USER_ID].to_numpy())
        predictions = {
            MULTI: fitted.predict(asked, movies).prediction.to_numpy(),
            POOLED: ridge(z, y, np.zeros(len(train)), z_test, np.zeros(len(asked))),
            INDEPENDENT: own,
        }
        for name, prediction in predictions.items():
            found.setdefault(name, {})[size] = rmse(asked[LABEL], prediction, fitted.model)
    return found


def new_users(spark: SparkSession, ratings: pd.DataFrame, movies: pd.DataFrame, seed: int) -> dict:
    """RMSE of users whom training did not see, on their ratings after the first 50 of a random order."""
    random = np.random.default_rng(seed)
    counts = ratings[USER_ID].value_counts()
    new = random.permutation(counts.index[counts > EXAMPLES[-1] + 10])[:NEW_USERS]
    theirs = ratings[ratings[USER_ID].isin(new)].sample(frac=1, random_state=seed)
    place = theirs.groupby(USER_ID).cumcount()
    asked, train = theirs[place >= EXAMPLES[-1]], ratings[~ratings[USER_ID].isin(new)]
    fitted = fit(spark, train, movies, [])
    factors, means = als_factors(spark, train)
    found: dict[str, dict[int, float]] = {}
    for n in EXAMPLES:
        examples = theirs[place < n]
        predictions = {
            MULTI: with_examples(fitted, examples).predict(asked, movies).prediction.to_numpy(),
            FOLDED: folded_in(factors, means, train[LABEL].mean(), examples, asked),
            INDEPENDENT: alone(fitted, movies, train[LABEL].mean(), examples, asked),
        }
        for name, prediction in predictions.items():
            found.setdefault(name, {})[n] = rmse(asked[LABEL], prediction, fitted.model)
    return found


def with_examples(fitted: Fitted, examples: pd.DataFrame) -> Fitted:
    """The model with users who have these examples and no others."""
    n, model = len(examples), fitted.model
    lists = pa.list_(pa.float64())
    none = {schema.A: lists, schema.B: lists, schema.PRIOR_MEAN: lists, schema.N_EVENTS: pa.int64()}
    columns = {name: pa.array(examples[name], pa.string()) for name in (USER_ID, INPUT_ID)}
    columns |= {LABEL: pa.array(examples[LABEL].astype(float)), WEIGHT: pa.array(np.ones(n))}
    known = examples[INPUT_ID].isin(fitted.features.ids.to_pandas()).to_numpy()
    table = pa.table(columns | {name: pa.nulls(n, kind) for name, kind in none.items()}).filter(pa.array(known))
    if not len(table):
        return Fitted(model, fitted.features, fitted.states.slice(0, 0), fitted.report)
    users = add_events(table, model, fitted.features, model.prior_mean_of_unknown)
    named = dict(zip(fitted.states.column_names[1:], (schema.A, schema.B, schema.PRIOR_MEAN), strict=True))
    states = pa.table({USER_ID: users[USER_ID], **{name: users[column] for name, column in named.items()}})
    return Fitted(model, fitted.features, states, fitted.report)


def als_factors(spark: SparkSession, train: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    rows = train.assign(user=train[USER_ID].astype(int), item=train[INPUT_ID].astype(int))
    als = ALS(rank=10, regParam=0.1, maxIter=15, userCol="user", itemCol="item", ratingCol=LABEL, seed=0)
    model = als.fit(spark.createDataFrame(rows[["user", "item", LABEL]]))
    factors = model.itemFactors.toPandas().set_index("id")["features"]
    factors.index = factors.index.astype(str)
    return factors, train.groupby(INPUT_ID)[LABEL].mean()


def folded_in(factors: pd.Series, means: pd.Series, mean: float, examples: pd.DataFrame, asked: pd.DataFrame) -> Array:
    """ALS's own half-step for a user: (QᵀQ + λnI)⁻¹ Qᵀy (Zhou et al. 2008), λ = 0.1."""
    prediction = asked[INPUT_ID].map(means).fillna(mean).to_numpy(float)
    groups = dict(list(examples[examples[INPUT_ID].isin(factors.index)].groupby(USER_ID)))
    known = asked[INPUT_ID].isin(factors.index).to_numpy()
    for user, rows in asked.reset_index(drop=True).groupby(USER_ID):
        if user not in groups:
            continue
        q, y = np.stack(factors.loc[groups[user][INPUT_ID]]), groups[user][LABEL].to_numpy(float)
        p = np.linalg.solve(q.T @ q + 0.1 * len(y) * np.eye(q.shape[1]), q.T @ y)
        at = rows.index[known[rows.index]]
        if len(at):
            prediction[at] = np.stack(factors.loc[rows.loc[at, INPUT_ID]]) @ p
    return prediction


def alone(fitted: Fitted, movies: pd.DataFrame, mean: float, examples: pd.DataFrame, asked: pd.DataFrame) -> Array:
    """A ridge of the user's own on the movies' attributes, about the mean of all; strength 10."""
    prediction = np.full(len(asked), mean)
    if not len(examples):
        return prediction
    z, z_asked = (encoded(fitted, movies, part[INPUT_ID]) for part in (examples, asked))
    user = asked[USER_ID].to_numpy()
    for each, at in _places(examples[USER_ID]).items():
        mine = user == each
        labels = examples[LABEL].to_numpy(float)[at]
        model = Ridge(10.0, fit_intercept=False).fit(np.column_stack([np.ones(len(at)), z[at]]), labels - mean)
        prediction[mine] += model.predict(np.column_stack([np.ones(mine.sum()), z_asked[mine]]))
    return prediction


def _places(names: Sequence[str]) -> dict[str, np.ndarray]:
    return pd.Series(np.arange(len(names))).groupby(np.asarray(names)).apply(np.asarray).to_dict()


if __name__ == "__main__":
    main()
