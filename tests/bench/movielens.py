"""MovieLens-100K: the five canonical splits, and GDMix's protocol for clicks.

``splits``: RMSE on u1 … u5, trained on all of each base part with the shipped defaults. Published on u1: GHRS 0.887,
GLocal-K 0.889. ``--sessions``: with two contexts more, the user's day and the user's hour, which say of a rating when it was
given and of its user what the mood was then; the published results do not use times.

``gdmix``: is a rating above 3? A random 80% of the ratings to train on, logistic loss; area under the ROC curve on the
rest. GDMix's best, with a deep model at its base, is 0.768.

    python tests/bench/movielens.py splits [--splits 1 2 3 4 5] [--sessions]
    python tests/bench/movielens.py gdmix [--repeats 3] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from experiment import Fitted, fit, rmse, session, summary
from pyspark.sql import SparkSession
from sklearn.metrics import roc_auc_score

from mtl.datasets import SPLITS, fetch_movielens, movielens
from mtl.schema import EVENT_TIME, INPUT_ID, LABEL, USER_ID

CACHE = Path(tempfile.gettempdir()) / "oracle-mtl-movielens"
TEST_FRACTION, LIKED = 0.2, 3
SESSIONS = ["user_day", "user_hour"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default=str(CACHE), help="folder of the downloaded data (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="settings of the model")
    commands = parser.add_subparsers(dest="command", required=True)
    splits = commands.add_parser("splits", help="RMSE on the canonical splits")
    splits.add_argument("--splits", type=int, nargs="+", default=list(SPLITS), choices=SPLITS)
    splits.add_argument("--sessions", action="store_true", help="with effects of a user's day and of a user's hour")
    gdmix = commands.add_parser("gdmix", help="AUC of ratings above 3, a random 80/20")
    gdmix.add_argument("--repeats", type=int, default=3, help="random splits (default: %(default)s)")
    gdmix.add_argument("--seed", type=int, default=0, help="of the first split; the next has the next")
    arguments = parser.parse_args()
    folder = fetch_movielens(arguments.cache)
    spark = session("movielens")
    if arguments.command == "splits":
        sessions = [f"model.contexts={json.dumps(SESSIONS)}"] if arguments.sessions else []
        result = canonical(spark, folder, arguments.splits, [*sessions, *arguments.set])
    else:
        result = clicks(spark, folder, range(arguments.seed, arguments.seed + arguments.repeats), arguments.set)
    print(json.dumps({"experiment": f"movielens {arguments.command}", **result}))


def canonical(spark: SparkSession, folder: Path, splits: list[int], assignments: list[str]) -> dict:
    runs = []
    for split in splits:
        train, test, inputs, users = read(folder, split)
        fitted = fit(spark, train, inputs, assignments, users)
        error = rmse(test[LABEL], fitted.predict(test, inputs).prediction.to_numpy(), fitted.model)
        runs.append({"split": split, "rmse": round(error, 4), **told(fitted)})
        print(f"u{split}: {runs[-1]}", file=sys.stderr)
    return {"rmse": round(float(np.mean([run["rmse"] for run in runs])), 4), "runs": runs}


def clicks(spark: SparkSession, folder: Path, seeds: range, assignments: list[str]) -> dict:
    train, test, inputs, users = read(folder, 1)
    events = pd.concat([train, test], ignore_index=True)
    events[LABEL] = (events[LABEL] > LIKED).astype(float)
    runs = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(events))
        n_test = round(TEST_FRACTION * len(events))
        tested, trained = events.iloc[order[:n_test]], events.iloc[order[n_test:]]
        fitted = fit(spark, trained, inputs, ["model.loss=logistic", *assignments], users)
        auc = roc_auc_score(tested[LABEL], fitted.predict(tested, inputs).prediction)
        runs.append({"seed": seed, "auc": round(float(auc), 4), **told(fitted)})
        print(f"split {seed}: {runs[-1]}", file=sys.stderr)
    ratio = TEST_FRACTION / (1 - TEST_FRACTION)
    return {"auc": summary([run["auc"] for run in runs], ratio), "ones": round(events[LABEL].mean(), 4), "runs": runs}


def read(folder: Path, split: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Events to train on (the demo's stream among them) and to test on, inputs and users."""
    data = movielens(folder, split)
    train, stream, test = (in_sessions(part.to_pandas()) for part in (data.train, data.stream, data.test))
    return pd.concat([train, stream], ignore_index=True), test, data.inputs.to_pandas(), data.users.to_pandas()


def in_sessions(rows: pd.DataFrame) -> pd.DataFrame:
    """Events with the day and the hour (UTC) of their user as text."""
    time = pd.to_datetime(rows[EVENT_TIME], unit="s")
    columns = [rows[USER_ID] + time.dt.strftime(f" {format}") for format in ("%Y-%m-%d", "%Y-%m-%d %H")]
    return rows[[USER_ID, INPUT_ID, LABEL]].assign(**dict(zip(SESSIONS, columns, strict=True)))


def told(fitted: Fitted) -> dict:
    return {name: fitted.report[name] for name in ("k", "iterations", "seconds")}


if __name__ == "__main__":
    main()
